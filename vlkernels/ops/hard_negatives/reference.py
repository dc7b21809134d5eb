"""The definition of the draw: every similarity, one inverse CDF per row, plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlkernels.core.collectives import ProcessGroup, Rows, gather_rows
from vlkernels.core.pairs import locate_pairs
from vlkernels.core.products import outside_autocast
from vlkernels.core.random import Rng, resolve_rng, uniform

IMAGE_TO_TEXT, TEXT_TO_IMAGE = 0, 1


def hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    rng: Rng | None = None,
    stream: int = 0,
    sample_ids: Tensor | None = None,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    rows = locate_pairs(image_features, group, rank_counts, labels=labels)
    state = resolve_rng(rng, image_features.device)
    all_labels = None if labels is None else gather_rows(labels, rows)

    def draw(queries: Tensor, keys: Tensor, direction: int) -> Tensor:
        draws = uniform(state, stream, sample_ids_or_rows(sample_ids, rows, keys.device), direction)
        with outside_autocast(queries):
            logits = logit_scale * wide(queries.detach()) @ wide(gather_rows(keys, rows)).T
        own = torch.arange(rows.start, rows.stop, device=keys.device)
        everyone = torch.arange(rows.total, device=keys.device)
        logits = logits.masked_fill(~admissible(own[:, None], everyone[None, :], all_labels), -torch.inf)
        weights = torch.exp(logits - finite_max(logits))
        total = weights.sum(1)
        return torch.where(total > 0, pick(weights, draws * total), -1)

    return draw(image_features, text_features, IMAGE_TO_TEXT), draw(
        text_features, image_features, TEXT_TO_IMAGE
    )


def wide(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def sample_ids_or_rows(sample_ids: Tensor | None, rows: Rows, device: torch.device) -> Tensor:
    """What the draws are keyed by; the row in the concatenated batch where the caller names nothing."""
    return torch.arange(rows.start, rows.stop, device=device) if sample_ids is None else sample_ids


def admissible(query: Tensor, key: Tensor, labels: Tensor | None) -> Tensor:
    """Which keys are negatives of which queries (both as rows of the concatenated batch)."""
    different = query != key
    return different if labels is None else different & (labels[query] != labels[key])


def finite_max(logits: Tensor) -> Tensor:
    """The maximum over the last dimension, kept; finite where nothing is admissible: weights become 0."""
    return logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)


def pick(weights: Tensor, threshold: Tensor) -> Tensor:
    """The first index that has a weight and exceeds the threshold with it; rounding never leads past the last."""
    has_weight = weights > 0
    # Sums in another order than the index's need not be equal on both sides of a weight of 0.
    beyond = has_weight & (running_sums(weights) > threshold[..., None])
    last = weights.shape[-1] - 1 - _first(has_weight.flip(-1))
    return torch.where(beyond.any(-1), _first(beyond), last)


def _first(marked: Tensor) -> Tensor:
    return marked.byte().argmax(-1)


def running_sums(weights: Tensor) -> Tensor:
    """Of the weights up to each, along the last dimension."""
    return weights.cumsum(-1) if weights.device.type == "cpu" else sums_by_doubling(weights)


def sums_by_doubling(weights: Tensor) -> Tensor:
    """Always in one order: PyTorch's ``cumsum`` on a card has several and refuses its deterministic mode."""
    sums, step = weights, 1
    while step < weights.shape[-1]:
        sums = torch.cat((sums[..., :step], sums[..., step:] + sums[..., :-step]), dim=-1)
        step *= 2
    return sums
