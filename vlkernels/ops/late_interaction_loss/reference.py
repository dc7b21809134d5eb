"""The definition of the late-interaction loss: every similarity of tokens, both directions, plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core import pairs
from vlkernels.core.collectives import ProcessGroup, Rows, gather_rows
from vlkernels.core.layout import SegmentLayout
from vlkernels.core.products import outside_autocast


@dataclass(frozen=True)
class Side:
    """The images or the texts of all ranks: sample b is rows ``starts[b] : starts[b] + lengths[b]`` of the tokens."""

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class Bounds:
    """Where the samples of all ranks lie in their joined tokens, and which of these this rank holds."""

    starts: Tensor
    lengths: Tensor
    longest: int
    token_rows: Rows


def late_interaction_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    logit_scale: Tensor | float,
    *,
    image_layout: SegmentLayout,
    text_layout: SegmentLayout,
    similarity: str = "mean_max",
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
    rank_reduction: str = "mean",
) -> Tensor:
    options = {"tokens": image_tokens, "D": image_tokens.shape[1], "similarity": similarity, "label_smoothing": label_smoothing}
    rows = pairs.locate_pairs(image_layout.lengths, group, rank_counts, impl="reference", **options)

    def side(tokens: Tensor, layout: SegmentLayout) -> Side:
        bounds = gather_bounds(len(tokens), *sample_bounds(layout), layout.max_seqlen, rows)
        everyone = pairs.of_all_ranks(tokens, bounds.token_rows, rank_reduction)
        return Side(everyone, bounds.starts, bounds.lengths, bounds.longest)

    images, texts = side(image_tokens, image_layout), side(text_tokens, text_layout)
    scale = pairs.held_by_all_ranks(logit_scale, image_tokens, rows, rank_reduction)
    targets = torch.arange(rows.total, device=image_tokens.device)
    losses = [
        F.cross_entropy(scale * similarities, targets, reduction="sum", label_smoothing=label_smoothing)
        for similarities in _similarities(images, texts, similarity)
    ]
    return (losses[0] + losses[1]) / (2 * rows.total)


def sample_bounds(layout: SegmentLayout) -> tuple[Tensor, Tensor]:
    """First row and number of rows of every sample, all of its segments together."""
    return layout.starts[:, 0], layout.lengths.sum(1, dtype=torch.int32)


def gather_bounds(num_tokens: int, starts: Tensor, lengths: Tensor, longest: int, rows: Rows) -> Bounds:
    """Of the samples of all ranks. How many tokens each rank holds is read by every host."""
    if rows.group is None:
        return Bounds(starts, lengths, longest, Rows((num_tokens,)))
    one_row_each = Rows((1,) * rows.world_size, rows.rank, rows.group)
    mine = torch.tensor([[num_tokens, longest]], device=starts.device)
    counts, longests = gather_rows(mine, one_row_each).T.tolist()
    token_rows = Rows(tuple(counts), rows.rank, rows.group)
    bounds = gather_rows(torch.stack((starts + token_rows.start, lengths), dim=1), rows)
    return Bounds(bounds[:, 0], bounds[:, 1], max(longests), token_rows)


def _similarities(images: Side, texts: Side, similarity: str) -> tuple[Tensor, Tensor]:
    """``[N, N]`` of images (rows) against texts, and of texts (rows) against images."""
    (u, image_here), (v, text_here) = _padded(images), _padded(texts)
    with outside_autocast(u):
        products = torch.einsum("ipd,jtd->ijpt", u, v)
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    meets = image_here[:, None, :, None] & text_here[None, :, None, :]
    products = torch.where(meets, products, -torch.inf)
    if similarity == "max":
        best = products.flatten(2).max(2).values
        return best, best.T
    of_images = _mean(products.max(3).values, image_here[:, None, :])
    of_texts = _mean(products.max(2).values, text_here[None, :, :])
    return of_images, of_texts.T


def _mean(best: Tensor, here: Tensor) -> Tensor:
    return torch.where(here, best, 0).sum(2) / here.sum(2)


def _padded(side: Side) -> tuple[Tensor, Tensor]:
    """``[N, longest, D]`` and which of these places hold a token; the others repeat the sample's last one."""
    place = torch.arange(max(side.longest, 1), device=side.tokens.device)
    lengths = side.lengths[:, None]
    return side.tokens[(side.starts[:, None] + torch.minimum(place, lengths - 1)).long()], place < lengths
