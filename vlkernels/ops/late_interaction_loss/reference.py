"""The definition of the late-interaction loss: every similarity of tokens, both directions, plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

    @staticmethod
    def of(tokens: Tensor, layout: SegmentLayout) -> Side:
        """All segments of a sample together."""
        return Side(tokens, layout.starts[:, 0], layout.lengths.sum(1, dtype=torch.int32), layout.max_seqlen)

    def places(self) -> tuple[Tensor, Tensor]:
        """``[N, longest]``: the row of every token of a sample, and whether there is one; others repeat the last."""
        place, lengths = torch.arange(max(self.longest, 1), device=self.tokens.device), self.lengths[:, None]
        return (self.starts[:, None] + torch.minimum(place, lengths - 1)).long(), place < lengths

    def held(self) -> Tensor:
        """``[num_tokens]``: which rows are some sample's."""
        rows, here = self.places()
        somewhere = torch.zeros(len(self.tokens) + 1, dtype=torch.bool, device=rows.device)
        return somewhere.index_fill(0, torch.where(here, rows, len(self.tokens)).flatten(), True)[:-1]


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
    token_share: float = 1.0,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
    rank_reduction: str = "mean",
) -> Tensor:
    options = {"tokens": image_tokens, "D": image_tokens.shape[1], "similarity": similarity, "label_smoothing": label_smoothing}
    own = (Side.of(image_tokens, image_layout), Side.of(text_tokens, text_layout))
    if token_share < 1:
        own = keep_salient(*own, token_share, salience)
    rows = pairs.locate_pairs(image_layout.lengths, group, rank_counts, impl="reference", **options)

    def of_all_ranks(side: Side) -> Side:
        bounds = gather_bounds(len(side.tokens), side.starts, side.lengths, side.longest, rows)
        everyone = pairs.of_all_ranks(side.tokens, bounds.token_rows, rank_reduction)
        return Side(everyone, bounds.starts, bounds.lengths, bounds.longest)

    images, texts = (of_all_ranks(side) for side in own)
    scale = pairs.held_by_all_ranks(logit_scale, image_tokens, rows, rank_reduction)
    targets = torch.arange(rows.total, device=image_tokens.device)
    losses = [
        F.cross_entropy(scale * similarities, targets, reduction="sum", label_smoothing=label_smoothing)
        for similarities in _similarities(images, texts, similarity)
    ]
    return (losses[0] + losses[1]) / (2 * rows.total)


Salience = Callable[[Side, Side], tuple[Tensor, Tensor]]


def salience(images: Side, texts: Side) -> tuple[Tensor, Tensor]:
    """Of every image token its largest product with any text token, and of every text token with any image token."""
    with outside_autocast(images.tokens):
        products = images.tokens.to(pairs.wide(images.tokens)) @ texts.tokens.to(pairs.wide(texts.tokens)).T
    products = torch.where(images.held()[:, None] & texts.held(), products, -torch.inf)
    return products.amax(1), products.amax(0)


def keep_salient(images: Side, texts: Side, share: float, salience: Salience) -> tuple[Side, Side]:
    """Of every sample the tokens with the largest salience, at least this share of them, in their order."""
    if len(images.starts) == 0:
        return images, texts
    with torch.no_grad():
        scores = salience(images, texts)
    return _keep(images, scores[0], share), _keep(texts, scores[1], share)


def _keep(side: Side, scores: Tensor, share: float) -> Side:
    rows, here = side.places()
    kept = (side.lengths.double() * share).ceil().int()
    order = torch.where(here, scores[rows], -torch.inf).argsort(dim=1, descending=True, stable=True)
    keeps = here & (order.argsort(1) < kept[:, None])
    starts = kept.cumsum(0, dtype=torch.int32) - kept
    room = min(len(side.tokens), int(len(side.tokens) * share) + len(kept))  # each sample rounds up by less than a token
    places = torch.where(keeps, starts[:, None] + keeps.cumsum(1) - 1, room)  # what is not kept goes behind the last one
    taken = rows.new_zeros(room + 1).scatter(0, places.flatten(), rows.flatten())[:room]
    return Side(side.tokens[taken], starts, kept, math.ceil(side.longest * share))


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
    (image_rows, image_here), (text_rows, text_here) = images.places(), texts.places()
    u, v = images.tokens[image_rows], texts.tokens[text_rows]
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
