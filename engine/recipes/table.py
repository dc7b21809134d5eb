"""A recipe in a few lines: its parts, who sees whom, and how many parameters it has beside the published model."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
import vlkernels as vk

from engine.build import build_model
from engine.config import Config
from engine.models import VisionLanguageModel
from engine.models.masks import mask_table
from engine.sections import ImageInput
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
    """The model of a run with as many words as it may have, without storage for its weights."""
    with torch.device("meta"):
        return build_model(config, config.tokenizer.vocab_size)


def num_parameters(model: VisionLanguageModel) -> int:
    """Each tied tensor once; copies that only follow others are not counted."""
    copied = 0 if model.teacher is None else sum(parameter.numel() for parameter in model.teacher.parameters())
    return sum(parameter.numel() for parameter in model.parameters()) - copied


def describe(name: str) -> str:
    """One system as a block of lines."""
    config = recipe(name)
    model = model_of(config)
    rows = {"paper": config.system.paper if config.system is not None else "none: of this project"}
    for role in config.model.roles:
        rows[role] = "\n".join([describe_role(config, role), *draw(config, role, model)])
    if (between := config.model.co_attention) is not None:
        rows["co-attention"] = f"{between.layers} x {between.width}, {between.heads} heads, image and text read each other"
    rows["objectives"] = ", ".join(config.objectives.active)
    rows["parameters"] = count(config, num_parameters(model))
    rows["status"] = config.system.status if config.system is not None else "for trials"
    return "\n".join([name, *(line for title, text in rows.items() for line in lines(title, text))])


def describe_role(config: Config, role: str) -> str:
    """What is embedded, the size of the transformer, and the role it reads by cross-attention."""
    stack = getattr(config.model, role)
    image = stack if isinstance(stack, ImageInput) else getattr(stack, "image", None)
    embedded = {
        "learned queries": getattr(stack, "queries", 0) > 0,
        "words": getattr(stack, "text", role != "image") and role != "fusion",
        image and f"{image.kind} of the image": image is not None,
    }
    parts = [" + ".join(what for what, given in embedded.items() if given)]
    blocks = f"{stack.layers} x {stack.width}, {stack.heads} heads, {stack.norm}-norm"
    if getattr(stack, "encoder", "transformer") == "gru":
        blocks = f"gru, {stack.layers} x {stack.width}"
    parts.append(blocks if stack.layers else f"no transformer, width {stack.width}")
    source = "image" if role == "fusion" else getattr(stack, "source", None)
    return ", ".join([*filter(None, parts), *([f"reads {source}"] if source is not None else [])])


def draw(config: Config, role: str, model: VisionLanguageModel) -> list[str]:
    """Its mask tables, where it attends at all: rows are who sees, columns who is seen; behind them stand the segments, and
    whose the table is where objectives have different ones."""
    stack = getattr(config.model, role)
    if role == "joint":
        return draw_joint(config, model.joint.segments)
    if getattr(stack, "reads", None) == "prefix":
        return drawn(stack.prefix_mask if stack.prefix_mask == "causal" else "prefix", ["prefix", "text"])
    if stack.layers == 0 or getattr(stack, "encoder", "transformer") == "gru":
        return []
    kind = "full" if getattr(getattr(model, role), "mask", None) is None else "causal"
    return drawn(kind, ["image" if role == "image" else "text"])


def draw_joint(config: Config, segments: list[str]) -> list[str]:
    """A table for every kind that an objective asks for."""
    readers: dict[str, list[str]] = {}
    for name, objective in config.objectives.active.items():
        readers.setdefault(objective.mask_of_joint(config.model.joint), []).append(name)
    several = len(readers) > 1
    return [line for kind, names in readers.items() for line in drawn(kind, segments, ", ".join(names) if several else "")]


def drawn(kind: str, segments: list[str], readers: str = "") -> list[str]:
    """A table, the segments beside its rows."""
    mask = mask_table(kind, segments) or vk.SegmentMask([["full"] * len(segments)] * len(segments))
    rows = [f"{row}  {segment}" for row, segment in zip(str(mask).splitlines(), segments, strict=True)]
    return [f"{rows[0]}, {readers}" if readers else rows[0], *rows[1:]]


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
