"""Retrieval among held-out pairs: by the contrastive score, and re-ranked by the matching head."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.objectives.parts.gallery import Gallery

DEPTHS = (1, 5, 10)


def retrieval(gallery: Gallery) -> dict[str, float]:
    """Recall both ways by the contrastive score, beside chance."""
    return both_ways(gallery.similarity, gallery.similarity.T, gallery.related)


def reranked_retrieval(
    gallery: Gallery, top: int, match: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float]:
    """The same after the matching head has put the `top` candidates of every query in a new order.

    `match(images, texts)` are its logits `[P, 2]` for pairs of the gallery.
    """
    similarity = gallery.similarity
    top = min(top, len(gallery))
    texts_of_image, images_of_text = _candidates(similarity, top), _candidates(similarity.T, top)
    images, texts = (texts_of_image | images_of_text.T).nonzero(as_tuple=True)
    logits = match(images, texts)
    matching = torch.full_like(similarity, -torch.inf)
    matching[images, texts] = logits[:, 1] - logits[:, 0]
    return both_ways(
        _candidates_first(similarity, texts_of_image, matching),
        _candidates_first(similarity.T, images_of_text, matching.T),
        gallery.related,
    )


def contrast(by_image: Tensor, by_text: Tensor) -> dict[str, float]:
    """The contrastive loss of logits `[query, candidate]` whose partners stand on the diagonal, mean of both directions;
    beside that of logits that are all alike."""
    own = torch.arange(len(by_image), device=by_image.device)
    loss = sum(F.cross_entropy(logits, own).item() for logits in (by_image, by_text)) / 2
    return {"loss": loss, "loss_all_alike": math.log(len(own))}


def both_ways(by_image: Tensor, by_text: Tensor, related: Tensor) -> dict[str, float]:
    """Recall of scores `[query, candidate]` in both directions, beside chance."""
    results: dict[str, float] = {}
    for name, scores, right in (("image_to_text", by_image, related), ("text_to_image", by_text, related.T)):
        ranks = best_ranks(scores, right)
        for depth in DEPTHS:
            results[f"{name}_recall@{depth}"] = (ranks < depth).float().mean().item()
    return results | {f"chance_recall@{depth}": chance(related, depth) for depth in DEPTHS}


def best_ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Wrong candidates before the best right one, of every query. A tie counts as wrong, and so does a NaN:
    scores that say nothing must not look like a perfect ranking."""
    scores = scores.nan_to_num(nan=-torch.inf)
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~right).sum(1)


def chance(related: Tensor, depth: int) -> float:
    """Expected recall of a random order: one minus the chance that `depth` draws are all wrong."""
    count, right = related.shape[1], related.sum(1).double()
    draws = torch.arange(min(depth, count), dtype=torch.float64, device=related.device)
    all_wrong = ((count - right[:, None] - draws) / (count - draws)).clamp(min=0).prod(1)
    return (1 - all_wrong).mean().item()


def _candidates(scores: Tensor, top: int) -> Tensor:
    """bool: is the column among the best `top` of its row?"""
    best = scores.topk(top, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def _candidates_first(scores: Tensor, candidates: Tensor, matching: Tensor) -> Tensor:
    """Scores that rank the candidates first, by `matching`, then all others as they stood."""
    # Cosines lie in [-1, 1], so everything from 2 on comes first.
    return torch.where(candidates, 2 + matching - matching[candidates].min(), scores)
