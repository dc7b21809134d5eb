"""Folders of finished runs: the names are ours, but for what another make-up of a role calls otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from engine.sections import Stack
from engine.weights.pieces import Piece

OTHERWISE = (("joint.queries_norm.", "joint.text.norm."), (".feed_forward.", ".feed_forwards.0."))
"""Of a stream of queries without text, and what the same is called beside a text (BLIP-2's stages)."""
OF_A_STACK = [field.name for field in dataclasses.fields(Stack) if "dropout" not in field.name]
OF_AN_INPUT = ["positions", "position_offset", "embedding_norm", "embedding_width", "page", "kind", "patch_size", "patch_bias"]


def differing(where: str, section: Any, settings: Mapping[str, Any]) -> list[str]:
    """What another model computes otherwise; `settings` are the section of the run's config.json."""
    found = dataclasses.asdict(section)
    names = [name for name in (*OF_A_STACK, *OF_AN_INPUT) if name in found and name in settings]
    return [f"{where}.{name} must be {settings[name]}, got {found[name]}" for name in names if found[name] != settings[name]]


def pieces(role: str, names: Iterable[str], tensors: Mapping[str, Any]) -> Iterator[Piece]:
    """Of the parameters `names` those of a role, or of heads and all else that is of none (`model`)."""
    for name in names:
        if role == "model" or name.startswith(f"{role}."):
            yield Piece(name, (_source(name, tensors),))


def _source(name: str, tensors: Mapping[str, Any]) -> str:
    others = (name.replace(ours, theirs) for ours, theirs in OTHERWISE)
    return next((one for one in (name, *others) if one in tensors), name)
