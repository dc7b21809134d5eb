"""The late-interaction loss over ranks: whose samples meet which, what is joined and what it is multiplied by.

The arithmetic of two blocks of samples on one device is a :class:`Tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vlkernels.core import collectives, pairs
from vlkernels.core.collectives import Rows
from vlkernels.core.exchange import Block, Side, form_gradients, make_side, meetings
from vlkernels.ops.late_interaction_loss.reference import Bounds, gather_bounds


@dataclass(frozen=True, eq=False)
class Samples:
    """Consecutive samples of one side of the batch of all ranks."""

    tokens: Tensor  # [T, D]
    starts: Tensor  # [n], rows of the tokens
    lengths: Tensor  # [n]
    longest: int  # at least the largest length
    start: int  # the number of the first sample in that batch

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + len(self.starts))


class Tiles(Protocol):
    """The similarities A and B of some images and texts; an object serves one call and may keep tiles from visit to visit.

    Vectors of a :class:`Statistics` are indexed by the numbers of samples in the batch of all ranks, blocks touch their
    spans.
    """

    def statistics(self, images: Samples, texts: Samples, of_images: Statistics, of_texts: Statistics) -> None:
        """Take scale A into the statistics of images, and scale B into those of texts."""

    def differentiate(
        self,
        images: Samples,
        texts: Samples,
        of_images: Statistics,
        of_texts: Statistics,
        toward_images: Tensor | None,
        toward_texts: Tensor | None,
    ) -> None:
        """Add to every token, in at least float32, what (softmax - targets) of A and of B give it, without the scale."""


@dataclass(frozen=True)
class Targets:
    """One on the own partner, smoothed over the batch of all ranks."""

    label_smoothing: float
    total: int

    def between(self, queries: Tensor, keys: Tensor, like: Tensor) -> Tensor:
        """``[queries, keys]`` of samples by their numbers."""
        partners = (queries[:, None] == keys).to(like.dtype)
        return partners.mul_(1 - self.label_smoothing).add_(self.label_smoothing / self.total)


MakeTiles = Callable[[str, Tensor, Targets, bool], Tiles]  # similarity, scale, targets, whether gradients will be asked for


def late_interaction_loss(
    make_tiles: MakeTiles,
    image_tokens: Tensor,
    text_tokens: Tensor,
    logit_scale: Tensor,
    image_starts: Tensor,
    image_lengths: Tensor,
    text_starts: Tensor,
    text_lengths: Tensor,
    longest_image: int,
    longest_text: int,
    similarity: str,
    label_smoothing: float,
    group: str,
    rank_counts: Sequence[int] | None,
    rank_reduction: str,
    exchange: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of image_tokens, text_tokens and logit_scale), gradients empty when not wanted."""
    kind = {"tokens": image_tokens, "D": image_tokens.shape[1]}
    options = {"exchange": exchange, "requires_grad": gradient, "similarity": similarity, "label_smoothing": label_smoothing}
    rows = pairs.locate_pairs(image_lengths, collectives.named_group(group), rank_counts, **kind, **options)
    scale = logit_scale.reshape(()).to(pairs.wide(image_tokens))
    meet = _Meeting(
        gather_bounds(len(image_tokens), image_starts, image_lengths, longest_image, rows),
        gather_bounds(len(text_tokens), text_starts, text_lengths, longest_text, rows),
        make_tiles(similarity, scale, Targets(label_smoothing, rows.total), gradient),
        rows,
        Statistics(rows.total, scale),
        Statistics(rows.total, scale),
    )
    images = make_side(exchange, image_tokens, meet.image_bounds.token_rows)
    texts = make_side(exchange, text_tokens, meet.text_bounds.token_rows)
    value = meet.value(images, texts)
    mean = 1 / (2 * rows.total)
    loss = collectives.sum_over_ranks(value, rows) * mean
    if not gradient:
        return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    if exchange == "gather":
        meet.of_images.over_rows(rows)  # those of other ranks meet this rank's texts here
    toward_images, toward_texts = form_gradients(images, texts, scale.dtype, meet.differentiate)
    factor = mean * pairs.gradient_factor(rows, rank_reduction)
    # A grows with the length of image tokens as with the scale. Rows of nobody may hold anything, and have no gradient.
    alignment = torch.where(toward_images != 0, image_tokens * toward_images, 0).sum()
    of_scale = (alignment * factor).to(logit_scale.dtype).reshape(logit_scale.shape)
    return loss, toward_images.mul_(scale * factor), toward_texts.mul_(scale * factor), of_scale


@dataclass(frozen=True, eq=False)
class _Meeting:
    """Blocks of tokens that meet, as the samples they are."""

    image_bounds: Bounds
    text_bounds: Bounds
    tiles: Tiles
    rows: Rows
    of_images: Statistics
    of_texts: Statistics

    def value(self, images: Side, texts: Side) -> Tensor:
        """This rank's share of the summed losses; each rank visits its own images against all texts."""
        for image_block, text_block in meetings(images, texts):
            met = self._samples(image_block, text_block)
            if met is not None:
                self.tiles.statistics(*met, self.of_images, self.of_texts)
        self.of_texts.over_ranks(self.rows)
        return self.of_images.losses(self.rows.own).sum() + self.of_texts.losses(self.rows.own).sum()

    def differentiate(self, image_block: Block, text_block: Block, *toward: Tensor | None) -> None:
        met = self._samples(image_block, text_block)
        if met is not None:
            self.tiles.differentiate(*met, self.of_images, self.of_texts, *toward)

    def _samples(self, image_block: Block, text_block: Block) -> tuple[Samples, Samples] | None:
        """``None`` where a side has tokens of nobody alone."""
        images = self._of_block(image_block, self.image_bounds)
        texts = self._of_block(text_block, self.text_bounds)
        return (images, texts) if len(images.starts) and len(texts.starts) else None

    def _of_block(self, block: Block, bounds: Bounds) -> Samples:
        span = self.rows.of(block.ranks)
        starts, lengths = bounds.starts[span] - block.start, bounds.lengths[span]
        return Samples(block.features, starts, lengths, bounds.longest, span.start)


class Statistics:
    """Softmax statistics of all images (or all texts), whose logits arrive tile by tile."""

    def __init__(self, length: int, like: Tensor):
        self.largest = like.new_full((length,), -torch.inf)
        self.total, self.wanted = like.new_zeros(2, length)

    def add(self, samples: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Take the logits of some samples against some of the other side."""
        largest = torch.maximum(self.largest[samples], logits.amax(1))
        shrunk = self.total[samples] * (self.largest[samples] - largest).exp_()
        self.largest[samples] = largest
        self.total[samples] = shrunk + (logits - largest[:, None]).exp_().sum(1)
        self.wanted[samples] += (logits * targets).sum(1)

    def softmax(self, samples: Tensor, logits: Tensor) -> Tensor:
        return (logits - self.largest[samples, None]).exp_() / self.total[samples, None]

    def losses(self, span: slice) -> Tensor:
        """Log-sum-exp minus the target's logits; large equal numbers cancel before small ones join."""
        return (self.largest[span] - self.wanted[span]) + self.total[span].log()

    def over_ranks(self, rows: Rows) -> None:
        """Join what the ranks saw of the same samples."""
        if rows.group is not None:
            mine = self.largest.clone()
            collectives.max_over_ranks(self.largest, rows)
            self.total *= mine.sub_(self.largest).exp_()
            self.total, self.wanted = collectives.sum_over_ranks(torch.stack((self.total, self.wanted)), rows)

    def over_rows(self, rows: Rows) -> None:
        """Join the samples of all ranks."""
        if rows.group is not None:
            own = torch.stack((self.largest[rows.own], self.total[rows.own]), dim=1)
            self.largest, self.total = collectives.gather_rows(own, rows).T.contiguous()
