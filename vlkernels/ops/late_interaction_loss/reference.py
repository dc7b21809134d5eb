"""The definition of the late-interaction loss: every similarity of tokens, both directions, plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core import pairs
from vlkernels.core.collectives import ProcessGroup, Rows, gather_rows, locate_rows
from vlkernels.core.layout import SegmentLayout


@dataclass(frozen=True)
class Side:
    """The images or the texts of all ranks: sample b is rows ``starts[b] : starts[b] + lengths[b]`` of the tokens."""

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int
    own: slice  # the rows of the tokens that this rank holds


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
    rows = locate_rows(image_layout.lengths, group, rank_counts)

    def join(own: Tensor, token_rows: Rows) -> Tensor:
        return pairs.of_all_ranks(own, token_rows, rank_reduction)

    images = gather_side(image_tokens, *sample_bounds(image_layout), image_layout.max_seqlen, rows, join)
    texts = gather_side(text_tokens, *sample_bounds(text_layout), text_layout.max_seqlen, rows, join)
    scale = pairs.held_by_all_ranks(logit_scale, image_tokens, rows, rank_reduction)
    targets = torch.arange(rows.total, device=image_tokens.device)
    losses = [
        F.cross_entropy(scale * similarities, targets, reduction="sum", label_smoothing=label_smoothing)
        for similarities in _similarities(images, texts, similarity)
    ]
    return (losses[0] + losses[1]) / max(2 * rows.total, 1)


def sample_bounds(layout: SegmentLayout) -> tuple[Tensor, Tensor]:
    """First row and number of rows of every sample, all of its segments together."""
    return layout.starts[:, 0], layout.lengths.sum(1, dtype=torch.int32)


def gather_side(
    tokens: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: int,
    rows: Rows,
    join: Callable[[Tensor, Rows], Tensor] = gather_rows,
) -> Side:
    """The samples of all ranks, their tokens joined by ``join``. How many each rank holds is read by every host."""
    if rows.group is None:
        alone = Rows((len(tokens),))
        return Side(join(tokens, alone), starts, lengths, longest, alone.own)
    one_row_each = Rows((1,) * rows.world_size, rows.rank, rows.group)
    mine = torch.tensor([[len(tokens), longest]], device=tokens.device)
    counts, longests = gather_rows(mine, one_row_each).T.tolist()
    token_rows = Rows(tuple(counts), rows.rank, rows.group)
    bounds = gather_rows(torch.stack((starts + token_rows.start, lengths), dim=1), rows)
    return Side(join(tokens, token_rows), bounds[:, 0], bounds[:, 1], max(longests), token_rows.own)


def _similarities(images: Side, texts: Side, similarity: str) -> tuple[Tensor, Tensor]:
    """``[N, N]`` of images (rows) against texts, and of texts (rows) against images."""
    (u, image_here), (v, text_here) = _padded(images), _padded(texts)
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
