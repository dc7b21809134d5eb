"""The contrastive loss over ranks: whose rows meet which, what is joined and what it is multiplied by.

The arithmetic of two blocks on one device is a :class:`Tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from vlkernels.core import collectives, pairs
from vlkernels.core.collectives import Rows
from vlkernels.core.exchange import Block, form_gradients, make_side, meetings
from vlkernels.ops.contrastive_loss.reference import gather_keys, queue_length

Pair = tuple[Tensor, Tensor]


class Tiles(Protocol):
    """The logits of an image block and a text block; an object serves one call and may keep tiles from visit to visit.

    ``scale`` multiplies products and has the dtype of logits. Vectors of a :class:`Statistics` are indexed by the numbers of
    rows in the batch of all ranks, blocks touch their spans. Gradients are added, in at least float32, and are those by the
    logits, without scale.

    ``alignment`` sums G times image-text products where an image's gradient is formed, and the excess of queries is kept;
    ``None`` where gradients are so exact that features times gradients give the gradient of the scale.
    """

    scale: Tensor
    alignment: Tensor | None

    def statistics(self, images: Block, texts: Block, of_images: Statistics, of_texts: Statistics) -> None:
        """Take the logits into the statistics of their rows and of their columns."""

    def differentiate(
        self,
        images: Block,
        texts: Block,
        of_images: Statistics,
        of_texts: Statistics,
        hard: float,
        toward_image: Tensor | None,
        toward_text: Tensor | None,
    ) -> None:
        """Add G texts and G^T images, G = softmax over rows + softmax over columns - 2 hard targets."""

    def attend(
        self, queries: Block, keys: Block, of_queries: Statistics, mixed: Tensor | None, wanted: Tensor | None
    ) -> None:
        """Take the logits into the statistics of their rows, and add keys to what is mixed of them.

        ``mixed`` is relative to the largest logits so far, as ``of_queries.total`` is; ``wanted`` takes the keys of the
        query's label in equal shares.
        """


MakeTiles = Callable[[Tensor, "Targets", bool], Tiles]  # scale, targets, whether gradients will be asked for


def contrastive_loss(
    make_tiles: MakeTiles,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    image_keys: Tensor | None,
    text_keys: Tensor | None,
    labels: Tensor | None,
    distillation: float,
    label_smoothing: float,
    group: str,
    rank_counts: Sequence[int] | None,
    rank_reduction: str,
    exchange: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of image_features, text_features and logit_scale), gradients empty when not wanted."""
    options = {
        "exchange": exchange,
        "requires_grad": gradient,
        "labels": labels,
        "rows in the queue": queue_length(image_features, image_keys),
        "distillation": distillation,
        "label_smoothing": label_smoothing,
    }
    rows = pairs.locate_pairs(image_features, collectives.named_group(group), rank_counts, **options)
    scale = logit_scale.reshape(()).to(pairs.wide(image_features))
    own = image_features, text_features
    # Without keys every label is a row's; gather_keys then finds no queue behind them.
    targets = Targets(None if labels is None else gather_keys(labels, rows), scale)
    tiles = make_tiles(scale, targets, gradient)
    if image_keys is not None and text_keys is not None:
        shares = label_smoothing, distillation
        value, *gradients = _against_keys(
            tiles, own, (image_keys, text_keys), targets, shares, rows, exchange, gradient
        )
    else:
        value, *gradients = _symmetric(tiles, own, label_smoothing, rows, exchange, gradient)
    mean = 1 / (2 * rows.total)
    loss = collectives.sum_over_ranks(value, rows) * mean
    if not gradient:
        return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    factor = mean * pairs.gradient_factor(rows, rank_reduction)
    toward_image, toward_text, alignment = gradients
    of_features = scale * factor
    of_scale = (alignment * factor).to(logit_scale.dtype).reshape(logit_scale.shape)
    return loss, toward_image.mul_(of_features), toward_text.mul_(of_features), of_scale


def _symmetric(
    tiles: Tiles, own: Pair, label_smoothing: float, rows: Rows, exchange: str, gradient: bool
) -> tuple[Tensor, ...]:
    """Loss and gradients of one matrix, whose tiles serve its rows (images) and its columns (texts) alike."""
    scale = tiles.scale
    images, texts = (make_side(exchange, features, rows) for features in own)
    hard = 1 - label_smoothing
    of_images, of_texts = Statistics(rows.total, scale), Statistics(rows.total, scale)
    for image_block, text_block in meetings(images, texts):
        tiles.statistics(image_block, text_block, of_images, of_texts)
    of_texts.over_ranks(rows)
    soft_image, soft_text = (_pull(label_smoothing, features, rows, scale.dtype) for features in own)
    value = of_images.losses(rows.own, hard) + of_texts.losses(rows.own, hard)
    value -= scale * ((own[0] * soft_text).sum(1) + (own[1] * soft_image).sum(1))
    if not gradient:
        return (value.sum(),)
    if exchange == "gather":
        of_images.over_rows(rows)  # those of other ranks meet this rank's texts here

    def meet(image_block: Block, text_block: Block, *toward: Tensor | None) -> None:
        tiles.differentiate(image_block, text_block, of_images, of_texts, hard, *toward)

    toward_image, toward_text = form_gradients(images, texts, scale.dtype, meet)
    # The targets are symmetric: the smoothing of both directions pulls a feature towards the same mean.
    toward_image.sub_(soft_text, alpha=2)
    toward_text.sub_(soft_image, alpha=2)
    if tiles.alignment is None:
        return value.sum(), toward_image, toward_text, (own[0] * toward_image).sum()
    return value.sum(), toward_image, toward_text, tiles.alignment - 2 * (own[0] * soft_text).sum()


def _against_keys(
    tiles: Tiles,
    own: Pair,
    keys: Pair,
    targets: Targets,
    shares: tuple[float, float],
    rows: Rows,
    exchange: str,
    gradient: bool,
) -> tuple[Tensor, ...]:
    """Loss and gradients of two matrices, images against text keys and texts against image keys."""
    scale = tiles.scale
    label_smoothing, distillation = shares
    hard = (1 - label_smoothing) * (1 - distillation)
    values, toward, alignment = [], [], scale.new_zeros(())
    for queries, opposite, teachers in ((own[0], keys[1], keys[0]), (own[1], keys[0], keys[1])):
        own_keys = opposite[: len(queries)]
        attention = _Attention(tiles, queries, own_keys, targets, rows, hard if gradient else None)
        soft = _pull(label_smoothing, opposite, rows, scale.dtype).expand(len(queries), -1)
        # The teacher enters the value, so its mixture is not left to products of half types.
        teacher = teachers[: len(queries)].to(scale.dtype)
        taught = _Attention(tiles, teacher, own_keys, targets, rows, 0.0) if distillation > 0 else None
        for block in _key_blocks(opposite, rows, exchange):
            attention.add(block)
            if taught is not None:
                taught.add(Block(block.features.to(scale.dtype), block.start, block.ranks))
        if taught is not None:
            soft = soft + (1 - label_smoothing) * distillation * taught.direction()
        values.append((attention.statistics.losses(rows.own, hard) - scale * (queries * soft).sum(1)).sum())
        if gradient:
            toward.append(attention.direction().sub_(soft))
            aligned = (queries * toward[-1]).sum()
            if tiles.alignment is not None:
                exact = attention.statistics.alignment(rows.own, hard) / scale - (queries * soft).sum()
                aligned = torch.where(scale == 0, aligned, exact)
            alignment += aligned
    value = values[0] + values[1]
    return (value, *toward, alignment) if gradient else (value,)


class _Attention:
    """Statistics of this rank's queries, and with ``hard`` their (softmax - hard targets) keys, in one visit of all keys."""

    def __init__(
        self, tiles: Tiles, queries: Tensor, own_keys: Tensor, targets: Targets, rows: Rows, hard: float | None
    ):
        self.statistics = Statistics(rows.total, tiles.scale)
        self._tiles, self._own, self._hard = tiles, rows.own, hard or 0.0
        self._queries = Block(queries.detach().contiguous(), rows.start)
        dtype = tiles.scale.dtype
        self._mixed = None if hard is None else self._queries.new_gradient(dtype)
        labelled = targets.labels is not None and bool(hard)
        self._of_label = self._queries.new_gradient(dtype) if labelled else None
        self._wanted = self._of_label if labelled else own_keys

    def add(self, keys: Block) -> None:
        if len(self._queries.features) > 0 and len(keys.features) > 0:
            self._tiles.attend(self._queries, keys, self.statistics, self._mixed, self._of_label)

    def direction(self) -> Tensor:
        self._mixed /= self.statistics.total[self._own, None]
        return self._mixed.sub_(self._wanted, alpha=self._hard)


def _key_blocks(keys: Tensor, rows: Rows, exchange: str) -> Iterator[Block]:
    """The keys of the batch of all ranks, then the queue, which every rank holds."""
    count = rows.counts[rows.rank]
    yield from make_side(exchange, keys[:count], rows).blocks()
    yield Block(keys[count:].contiguous(), rows.total)


def _pull(share: float, features: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """``share`` times the mean row of all ranks; rows past this rank's own are a queue, which every rank holds."""
    if share == 0:
        return features.new_zeros(features.shape[1], dtype=dtype)
    own, queue = features[: rows.counts[rows.rank]], features[rows.counts[rows.rank] :]
    total = collectives.sum_over_ranks(own.sum(0, dtype=dtype), rows) + queue.sum(0, dtype=dtype)
    return total.mul_(share / (rows.total + len(queue)))


class Targets:
    """Hard targets: keys with the label of the query in equal shares, without labels its own key alone."""

    def __init__(self, labels: Tensor | None, like: Tensor):
        self.labels = labels
        self.share: Tensor | None = None
        if labels is not None:
            ordered = labels.sort().values
            equal = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
            self.share = equal.to(like.dtype).reciprocal_()


class Statistics:
    """Softmax statistics of the rows (or columns) of the logits of all ranks, which arrive block after block."""

    def __init__(self, length: int, like: Tensor):
        self.largest = like.new_full((length,), -torch.inf)
        self.total, self.positive, self.excess = like.new_zeros(3, length)

    def losses(self, span: slice, hard: float) -> Tensor:
        """Log-sum-exp minus ``hard`` positive logits; large equal numbers cancel before small ones join."""
        return (self.largest[span] - hard * self.positive[span]) + self.total[span].log()

    def alignment(self, span: slice, hard: float) -> Tensor:
        """The sum of (softmax - ``hard`` targets) times logits. ``excess`` is that of exponentials times logits - largest."""
        return (self.largest[span] - hard * self.positive[span] + self.excess[span] / self.total[span]).sum()

    def over_ranks(self, rows: Rows) -> None:
        """Join what the ranks saw of the same columns."""
        if rows.group is not None:
            mine = self.largest.clone()
            collectives.max_over_ranks(self.largest, rows)
            self.total *= mine.sub_(self.largest).exp_()
            joined = torch.stack((self.total, self.positive))
            self.total, self.positive = collectives.sum_over_ranks(joined, rows)

    def over_rows(self, rows: Rows) -> None:
        """Join the rows of all ranks."""
        if rows.group is not None:
            own = torch.stack((self.largest[rows.own], self.total[rows.own]), dim=1)
            self.largest, self.total = collectives.gather_rows(own, rows).T.contiguous()
