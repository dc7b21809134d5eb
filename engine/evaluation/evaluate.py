"""Everything that is measured on held-out samples, each figure beside what can be had blindly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from engine.batch import Batch
from engine.config import Config
from engine.data import DataError, Tokenizer
from engine.evaluation.sheet import draw_sheet
from engine.evaluation.zero_shot import zero_shot
from engine.models import VisionLanguageModel
from engine.objectives.parts.held_out import HeldOut, NothingToMeasure


@torch.no_grad()
def evaluate(
    model: VisionLanguageModel,
    read: Callable[[int, str | None], Iterable[Batch]],
    config: Config,
    *,
    tokenizer: Tokenizer | None = None,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Figures by group: what the objectives of the run measure, and zero-shot classification.

    `read(samples, task)` gives the held-out batches of so many samples, prepared for one objective or for none (None).
    The model holds whole weights (`Engine.whole_module` under ZeRO-3). Nothing is exchanged between ranks: one rank may
    evaluate alone. `tokenizer` is needed for zero-shot classification and for the sheet of retrievals.
    """
    was_training = model.training
    model.eval()
    held_out, results = HeldOut(read, model, config.evaluation), {}
    try:
        for objective in config.objectives.active.values():
            results |= objective.measure(model, held_out)
        if config.evaluation.zero_shot is not None and tokenizer is not None:
            results["zero_shot"] = zero_shot(model, config.evaluation.zero_shot, tokenizer, config)
        drawn = sheet is not None and tokenizer is not None
        if drawn and model.options.compares_towers and model.regions is None:
            draw_sheet(sheet, held_out.gallery, held_out.ranked, tokenizer, config)
    except NothingToMeasure as error:
        raise DataError(str(error)) from None
    finally:
        model.train(was_training)
    return {"pairs": held_out.most, **results}


def describe(results: dict[str, Any]) -> str:
    """The figures as lines for a reader, each with what can be had without looking at the pair."""
    lines = [f"evaluation on {results['pairs']} held-out pairs (in brackets what is to be surpassed)"]
    for group, figures in results.items():
        if isinstance(figures, dict):
            by_chance = any(name.startswith("chance") for name in figures)
            shown = _beside_chance(figures) if by_chance else _beside_others(figures)
            lines.append(f"  {group}: {', '.join(shown)}")
    return "\n".join(lines)


def _beside_chance(figures: dict[str, float]) -> list[str]:
    """In percent."""
    return [
        f"{name} {100 * value:.1f} ({100 * _chance(figures, name):.3g})"
        for name, value in figures.items()
        if not name.startswith(("chance", "images"))
    ]


def _beside_others(figures: dict[str, float]) -> list[str]:
    """NAME with every NAME_OTHER of the group in brackets."""
    shown = []
    for name, value in figures.items():
        others = {other.removeprefix(f"{name}_"): other for other in figures if other.startswith(f"{name}_")}
        if others:
            beside = (f"{words.replace('_', ' ')} {_number(other, figures)}" for words, other in others.items())
            shown.append(f"{name} {_number(name, figures)} ({', '.join(beside)})")
    return shown


def _number(name: str, figures: dict[str, float]) -> str:
    return f"{100 * figures[name]:.3g} %" if name.startswith("accuracy") else f"{figures[name]:.4g}"


def _chance(figures: dict[str, float], name: str) -> float:
    depth = name.partition("@")[2]
    return figures[f"chance_recall@{depth}" if depth else "chance"]
