"""A recipe in a few lines: its parts, who sees whom, and how many parameters it has beside the published model."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
import vlkernels as vk

from engine.config import Config
from engine.models import VisionLanguageModel
from engine.objectives import add_heads
from engine.training.command_line import parse

FOLDER = Path(__file__).parent
INDENT = 13


def names() -> list[str]:
    """All recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe(name: str, *overrides: str) -> Config:
    """A recipe as a run would parse it."""
    return parse([f"--config={FOLDER / name}.yaml", *overrides])


def model_of(config: Config) -> VisionLanguageModel:
    """The model of a run without storage for its weights, with the heads of its objectives."""
    with torch.device("meta"):
        model = VisionLanguageModel(config.model, config.tokenizer.vocab_size, config.data.regions, config.impl)
        add_heads(model, config.objectives.active)
    return model


def num_parameters(model: VisionLanguageModel) -> int:
    """Each tied tensor once; copies that only follow others are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe(name: str) -> str:
    """One system as a block of lines."""
    config = recipe(name)
    model = model_of(config)
    rows = {"paper": config.system.paper if config.system is not None else "of this project"}
    for role in config.model.roles:
        rows[role] = describe_role(config, role)
        if (mask := getattr(getattr(model, role), "mask", None)) is not None:
            rows[f"{role} mask"] = draw(mask)
    rows["objectives"] = ", ".join(config.objectives.active)
    rows["parameters"] = count(config, num_parameters(model))
    return "\n".join([name, *(line for title, text in rows.items() for line in lines(title, text))])


def describe_role(config: Config, role: str) -> str:
    """Its sizes, and what its section says beside them."""
    stack = getattr(config.model, role)
    sizes = f"{stack.layers} x {stack.width}, {stack.heads} heads, {stack.norm}-norm"
    reads = getattr(stack, "source", None) or ("image" if role == "fusion" else None)
    return sizes if reads is None else f"{sizes}, reads {reads}"


def draw(mask: vk.SegmentMask) -> str:
    """The table: rows see columns; a full cell, a causal one, one that is not seen."""
    return str(mask)


def count(config: Config, parameters: int) -> str:
    """Ours, beside the published model's."""
    system = config.system
    if system is None or system.parameters is None:
        return f"{parameters:,}"
    more = "".join(f" {'+' if n > 0 else '-'} {abs(n):,} ({what})" for what, n in system.difference.items())
    sign = {"exact": "=", "rounded": "about"}[system.precision] if system.agrees(parameters) else "NOT"
    return f"{parameters:,} {sign} {system.parameters:,} of {system.counted}{more}"


def lines(title: str, text: str) -> list[str]:
    """Indented, the title before the first."""
    shown = [piece for line in text.splitlines() for piece in textwrap.wrap(line, 110) or [""]]
    return [f"  {title if not number else '':{INDENT}} {line}" for number, line in enumerate(shown)]
