"""Everything that is measured on held-out pairs, each figure beside chance."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from engine.config import Config
from engine.batch import Batch
from engine.data import DataError, Tokenizer
from engine.evaluation.accuracy import masked_language_accuracy, matching_accuracy
from engine.evaluation.gallery import encode_gallery
from engine.evaluation.retrieval import reranked_retrieval, retrieval
from engine.evaluation.sheet import draw_sheet
from engine.evaluation.zero_shot import zero_shot
from engine.models import AlignAndFuse


@torch.no_grad()
def evaluate(
    model: AlignAndFuse,
    batches: Iterable[Batch],
    config: Config,
    *,
    tokenizer: Tokenizer | None = None,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Figures by group: contrastive, reranked, matching, masked_language, zero_shot, as the run has them.

    The model holds whole weights (`Engine.whole_module` under ZeRO-3). Nothing is exchanged between ranks:
    one rank may evaluate alone. `tokenizer` is needed for zero-shot classification and for the sheet of
    retrievals.
    """
    was_training = model.training
    model.eval()
    try:
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
    finally:
        model.train(was_training)
    return results


def describe(results: dict[str, Any]) -> str:
    """The figures as lines for a reader, in percent, chance always beside them."""
    lines = [f"evaluation on {results['pairs']} held-out pairs (chance in brackets)"]
    for group, figures in results.items():
        if isinstance(figures, dict):
            shown = [
                f"{name} {100 * value:.1f} ({100 * _chance(figures, name):.3g})"
                for name, value in figures.items()
                if not name.startswith(("chance", "images"))
            ]
            lines.append(f"  {group}: {', '.join(shown)}")
    return "\n".join(lines)


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
