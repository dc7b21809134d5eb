"""The draw in two levels: tiles of logits leave a weight per block; a drawn block is visited again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlkernels.core import collectives
from vlkernels.core.pairs import locate_pairs
from vlkernels.core.random import uniform
from vlkernels.ops.hard_negatives.reference import (
    IMAGE_TO_TEXT,
    TEXT_TO_IMAGE,
    admissible,
    finite_max,
    pick,
    running_sums,
    sample_ids_or_rows,
    wide,
)

TILE_ROWS, TILE_COLUMNS = 256, 4096
BLOCK = 32


# (queries, keys, logit_scale, row of the first query in the concatenated batch, labels of all keys, uniform draws) -> rows
# of the concatenated batch, -1 for no negative.
Draw = Callable[[Tensor, Tensor, Tensor, int, Tensor | None, Tensor], Tensor]


def hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    state: Tensor,
    stream: int,
    sample_ids: Tensor | None,
    group: str,
    rank_counts: Sequence[int] | None,
    *,
    draw: Draw | None = None,
) -> tuple[Tensor, Tensor]:
    """(text of every image, image of every text) as rows of the concatenated batch, -1 for no negative."""
    rows = locate_pairs(image_features, collectives.named_group(group), rank_counts, labels=labels)
    all_labels = None if labels is None else collectives.gather_rows(labels, rows)
    ids = sample_ids_or_rows(sample_ids, rows, image_features.device)

    def one_way(queries: Tensor, keys: Tensor, direction: int) -> Tensor:
        draws = uniform(state, stream, ids, direction)
        keys = collectives.gather_rows(keys, rows)
        return (draw or _draw_by_spans)(queries, keys, logit_scale, rows.start, all_labels, draws)

    return one_way(image_features, text_features, IMAGE_TO_TEXT), one_way(text_features, image_features, TEXT_TO_IMAGE)


def _draw_by_spans(queries: Tensor, keys: Tensor, scale: Tensor, first: int, labels: Tensor | None, draws: Tensor) -> Tensor:
    drawn = torch.empty(len(queries), dtype=torch.int64, device=keys.device)
    own = torch.arange(first, first + len(queries), device=keys.device)
    for start in range(0, len(queries), TILE_ROWS):
        span = slice(start, start + TILE_ROWS)
        drawn[span] = _draw(wide(queries[span]) * scale, keys, own[span], labels, draws[span])
    return drawn


def _draw(queries: Tensor, keys: Tensor, own: Tensor, labels: Tensor | None, draws: Tensor) -> Tensor:
    """One key for each query; ``own`` are the queries' rows in the concatenated batch."""
    block_lse = _block_log_weights(queries, keys, own, labels)
    largest = finite_max(block_lse)
    block_weights = torch.exp(block_lse - largest)
    total = block_weights.sum(1)
    block = pick(block_weights, draws * total)
    before = (running_sums(block_weights) - block_weights).gather(1, block[:, None])
    candidates = block[:, None] * BLOCK + torch.arange(BLOCK, device=keys.device)
    inside = candidates.clamp_max(len(keys) - 1)
    logits = torch.bmm(wide(keys[inside]), queries[:, :, None]).squeeze(2)
    allowed = admissible(own[:, None], inside, labels) & (candidates < len(keys))
    weights = torch.exp(logits.masked_fill(~allowed, -torch.inf) - largest)
    chosen = candidates.gather(1, pick(weights, draws * total - before.squeeze(1))[:, None])
    return torch.where(total > 0, chosen.squeeze(1), -1)


def _block_log_weights(queries: Tensor, keys: Tensor, own: Tensor, labels: Tensor | None) -> Tensor:
    """Log-sum-exp of the admissible logits of every block of neighbouring keys: ``[queries, blocks]``."""
    parts = []
    for first in range(0, len(keys), TILE_COLUMNS):
        part = keys[first : first + TILE_COLUMNS]
        columns = torch.arange(first, first + len(part), device=keys.device)
        logits = queries @ wide(part).T
        logits.masked_fill_(~admissible(own[:, None], columns[None, :], labels), -torch.inf)
        blocks = pad(logits, (0, -len(part) % BLOCK), value=-torch.inf).unflatten(1, (-1, BLOCK))
        largest = finite_max(blocks)
        parts.append(torch.sub(blocks, largest).exp_().sum(2).log_().add_(largest.squeeze(2)))
    return torch.cat(parts, dim=1)
