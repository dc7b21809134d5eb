"""Everything that is measured on held-out pairs, each figure beside chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from engine.config import Config
from engine.batch import Batch
from engine.data import DataError, Tokenizer
from engine.evaluation.accuracy import masked_language_accuracy, matching_accuracy
from engine.evaluation.gallery import encode_gallery
from engine.evaluation.one_stream import evaluate_one_stream
from engine.evaluation.retrieval import reranked_retrieval, retrieval
from engine.evaluation.sheet import draw_sheet
from engine.evaluation.zero_shot import zero_shot
from engine.models import AlignAndFuse, VisionLanguageModel


@torch.no_grad()
def evaluate(
    model: VisionLanguageModel,
    read: Callable[[int, str | None], Iterable[Batch]],
    config: Config,
    *,
    tokenizer: Tokenizer | None = None,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Figures by group, as the run has them: retrieval, matching, every loss, zero-shot classification.

    `read(pairs, task)` gives the held-out batches of so many pairs, made for one objective or (None) for all that
    share batches. The model holds whole weights (`Engine.whole_module` under ZeRO-3). Nothing is exchanged between
    ranks: one rank may evaluate alone. `tokenizer` is needed for zero-shot classification and for the sheet of
    retrievals.
    """
    was_training = model.training
    model.eval()
    try:
        if isinstance(model, AlignAndFuse):
            return evaluate_towers(model, read(config.evaluation.batch, None), config, tokenizer, sheet)
        return evaluate_one_stream(model, read, config)
    finally:
        model.train(was_training)


def evaluate_towers(
    model: AlignAndFuse,
    batches: Iterable[Batch],
    config: Config,
    tokenizer: Tokenizer | None,
    sheet: Path | None,
) -> dict[str, Any]:
    """Contrastive, reranked, matching, masked_language and zero_shot, each figure beside chance."""
    kept = _first_pairs(batches, config.evaluation.gallery, model.logit_scale.device)
    if not kept:
        raise DataError("there are no held-out pairs to evaluate")
    gallery = encode_gallery(model, kept)
    results: dict[str, Any] = {"pairs": len(gallery), "contrastive": retrieval(gallery)}
    if config.objectives.matching is not None:
        results["matching"] = matching_accuracy(model, gallery)
        if config.evaluation.rerank_top:
            results["reranked"] = reranked_retrieval(model, gallery, config.evaluation.rerank_top)
    if config.objectives.masked_language is not None:
        results["masked_language"] = masked_language_accuracy(model, kept)
    if config.evaluation.zero_shot is not None and tokenizer is not None:
        results["zero_shot"] = zero_shot(model, config.evaluation.zero_shot, tokenizer, config)
    if sheet is not None and tokenizer is not None:
        draw_sheet(sheet, gallery, kept, tokenizer, config)
    return results


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


def _first_pairs(batches: Iterable[Batch], limit: int, device: torch.device) -> list[Batch]:
    """Whole batches of together at most `limit` pairs, at least one."""
    kept: list[Batch] = []
    pairs = 0
    for batch in batches:
        pairs += len(batch.labels)
        if kept and pairs > limit:
            break
        kept.append(batch.to(device))
    return kept
