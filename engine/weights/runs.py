"""Folders of finished runs: the names are ours, but for what another make-up of a role calls otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from engine.sections import Stack
from engine.weights.pieces import Piece
from engine.weights.sizes import MAY_DIFFER, kept_line

OTHERWISE = (("joint.queries_norm.", "joint.text.norm."), (".feed_forward.", ".feed_forwards.0."))
"""Of a stream of queries without text, and what the same is called beside a text (BLIP-2's stages)."""
OF_A_STACK = [
    field.name for field in dataclasses.fields(Stack) if "dropout" not in field.name and field.name not in MAY_DIFFER
]
OF_AN_INPUT = [
    "positions", "position_offset", "embedding_norm", "embedding_width", "page", "encoder",
    "kind", "patch_size", "patch_bias", "box_values", "mean_token", "backbone", "stages", "unit_cells",
]  # fmt: skip


def differing(where: str, section: Any, settings: Mapping[str, Any]) -> list[str]:
    """What another model computes otherwise; `settings` are the section of the run's config.json."""
    found = dataclasses.asdict(section)
    names = [name for name in (*OF_A_STACK, *OF_AN_INPUT) if name in found and name in settings]
    return [f"{where}.{name} must be {settings[name]}, got {found[name]}" for name in names if found[name] != settings[name]]


def kept(where: str, section: Any, settings: Mapping[str, Any]) -> list[str]:
    """What the run keeps as it has it."""
    found = {name: getattr(section, name) for name in MAY_DIFFER if name in settings}
    return [kept_line(f"{where}.{name}", value, settings[name]) for name, value in found.items() if value != settings[name]]


def role_there(role: str, settings: Mapping[str, Any]) -> str | None:
    """The role of a run that can fill one of ours: the same, or the text that a language model was trained as."""
    there = "text" if role == "decoder" and settings.get("decoder") is None else role
    return there if settings.get(there) is not None else None


def pieces(role: str, there: str, names: Iterable[str], tensors: Mapping[str, Any]) -> Iterator[Piece]:
    """Of the parameters `names` those of a role, as the run's role `there` has them; of another role what both have."""
    for name in names:
        if name.startswith(f"{role}."):
            source = f"{there}.{name.removeprefix(f'{role}.')}"
            others = (source.replace(ours, theirs) for ours, theirs in OTHERWISE)
            found = next((one for one in (source, *others) if one in tensors), None)
            if found is not None or role == there:
                yield Piece(name, (found or source,))
