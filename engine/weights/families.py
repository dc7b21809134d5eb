"""All families, and which of them a folder of `transformers` is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.weights import (
    albert,
    bart,
    bert,
    blip,
    clip,
    distilbert,
    electra,
    gpt2,
    layoutlmv2,
    opt,
    q_former,
    resnet,
    t5,
    vilt,
    vision,
)
from engine.weights.family import Family

FAMILIES: tuple[Family, ...] = (
    bert.BERT,
    bert.ROBERTA,
    albert.ALBERT,
    distilbert.DISTILBERT,
    electra.ELECTRA,
    electra.GENERATOR,
    bert.LAYOUTLM,
    layoutlmv2.LAYOUTLMV2,
    gpt2.GPT2,
    gpt2.GPT,
    opt.OPT,
    t5.T5,
    bart.BART,
    vision.VIT,
    vision.DEIT,
    vision.MAE,
    clip.CLIP,
    clip.CLIP_VISION,
    clip.SIGLIP,
    clip.SIGLIP_VISION,
    vilt.VILT,
    vilt.VILT_RANKS,
    resnet.RESNET,
    blip.BLIP,
    blip.BLIP_CAPTIONS,
    q_former.BLIP2_STAGE1,
    q_former.BLIP2_STAGE2,
)
"""Of those that a model could be written as the first is taken."""


def family_of(config: Mapping[str, Any]) -> Family | None:
    """By its classes, else by its kind."""
    of_kind = [family for family in FAMILIES if family.kind == config.get("model_type")]
    named = set(config.get("architectures") or ())
    return next((family for family in of_kind if named & family.classes.keys()), next(iter(of_kind), None))
