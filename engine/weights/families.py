"""All families, and which of them a folder of `transformers` is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.weights import bert, vision
from engine.weights.family import Family

FAMILIES: tuple[Family, ...] = (bert.BERT, bert.ROBERTA, bert.LAYOUTLM, vision.VIT)
"""Of those that a model could be written as the first is taken."""


def family_of(config: Mapping[str, Any]) -> Family | None:
    """By its classes, else by its kind."""
    of_kind = [family for family in FAMILIES if family.kind == config.get("model_type")]
    named = set(config.get("architectures") or ())
    return next((family for family in of_kind if named & family.classes.keys()), next(iter(of_kind), None))
