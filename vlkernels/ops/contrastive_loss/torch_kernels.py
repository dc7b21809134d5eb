"""The contrastive loss over tiles of logits: never the N x N matrix, and gradients come with the value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlkernels.core import collectives
from vlkernels.core.collectives import Rows
from vlkernels.ops.contrastive_loss.reference import gather_keys

TILE = 2048
KEPT_TILES = 16

Pair = tuple[Tensor, Tensor]


def contrastive_loss(
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
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of image_features, text_features and logit_scale), gradients empty when not wanted."""
    rows = collectives.locate_rows(image_features, collectives.named_group(group), rank_counts)
    scale = logit_scale.reshape(()).to(_wide(image_features))
    own = image_features, text_features
    if image_keys is not None and text_keys is not None:
        keys = gather_keys(image_keys, rows), gather_keys(text_keys, rows)
        positives = _Positives(None if labels is None else gather_keys(labels, rows), scale)
        value, *gradients = _against_keys(
            own, keys, scale, positives, distillation, label_smoothing, rows, gradient
        )
    else:
        positives = _Positives(None if labels is None else collectives.gather_rows(labels, rows), scale)
        value, *gradients = _symmetric(own, scale, positives, label_smoothing, rows, gradient)
    mean = 1 / max(2 * rows.total, 1)
    loss = collectives.sum_over_ranks(value, rows) * mean
    if not gradient:
        return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    factor = mean * (rows.world_size if rank_reduction == "mean" else 1)
    toward_image, toward_text, alignment = gradients
    of_features = scale * factor
    of_scale = (alignment * factor).to(logit_scale.dtype).reshape(logit_scale.shape)
    return loss, toward_image.mul_(of_features), toward_text.mul_(of_features), of_scale


def _symmetric(
    own: Pair, scale: Tensor, positives: _Positives, label_smoothing: float, rows: Rows, gradient: bool
) -> tuple[Tensor, ...]:
    """Loss and gradients of one matrix, whose tiles serve its rows (images) and its columns (texts) alike."""
    images, texts = (collectives.gather_rows(features, rows) for features in own)
    hard = 1 - label_smoothing
    logits = _Logits(images, texts, scale, keep=KEPT_TILES if gradient else 0)
    of_images, of_texts = _statistics(logits, positives, rows)
    soft_text, soft_image = (
        label_smoothing * features.mean(0, dtype=scale.dtype) for features in (texts, images)
    )
    value = of_images.losses(rows.own, hard) + of_texts.losses(rows.own, hard)
    value -= scale * ((own[0] * soft_text).sum(1) + (own[1] * soft_image).sum(1))
    if not gradient:
        return (value.sum(),)
    toward_image, toward_text = _directions(
        logits, of_images.over_rows(rows), of_texts, positives, hard, rows
    )
    # The targets are symmetric: the smoothing of both directions pulls a feature towards the same mean.
    toward_image.sub_(soft_text, alpha=2)
    toward_text.sub_(soft_image, alpha=2)
    return value.sum(), toward_image, toward_text, (own[0] * toward_image).sum()


def _statistics(logits: _Logits, positives: _Positives, rows: Rows) -> tuple[_Statistics, _Statistics]:
    """Statistics of this rank's rows and of every column; each rank visits its own rows once."""
    of_images, of_texts = _Statistics(rows.total, logits.scale), _Statistics(rows.total, logits.scale)
    own, others = _spans(rows, rows.total)
    for i in own:
        for j in own + others:
            tile = logits.tile(i, j)
            of_images.add(i, tile, positives.total(tile, i, j, 1), 1)
            of_texts.add(j, tile, positives.total(tile, i, j, 0), 0)
    return of_images, of_texts.over_ranks(rows)


def _directions(
    logits: _Logits,
    of_images: _Statistics,
    of_texts: _Statistics,
    positives: _Positives,
    hard: float,
    rows: Rows,
) -> Pair:
    """This rank's rows of (G texts, G^T images), G = softmax over rows + softmax over columns - 2 targets."""
    images, texts = logits.queries, logits.keys
    toward_image = torch.zeros_like(images[rows.own], dtype=logits.scale.dtype)
    toward_text = torch.zeros_like(toward_image)
    own, others = _spans(rows, rows.total)
    pairs = [(i, j) for i in own for j in own + others] + [(i, j) for i in others for j in own]
    for i, j in pairs:
        tile = logits.tile(i, j)
        gradient = of_images.exponentials(i, tile, 1).mul_(of_images.reciprocal(i)[:, None])
        gradient.addcmul_(of_texts.exponentials(j, tile, 0), of_texts.reciprocal(j))
        positives.subtract(gradient, i, j, 2 * hard)
        if i in own:
            _add_product(toward_image[_within(i, rows)], gradient, texts[j])
        if j in own:
            _add_product(toward_text[_within(j, rows)], gradient.T, images[i])
    return toward_image, toward_text


def _against_keys(
    own: Pair,
    keys: Pair,
    scale: Tensor,
    positives: _Positives,
    distillation: float,
    label_smoothing: float,
    rows: Rows,
    gradient: bool,
) -> tuple[Tensor, ...]:
    """Loss and gradients of two matrices, images against text keys and texts against image keys."""
    hard = (1 - label_smoothing) * (1 - distillation)
    values, toward = [], []
    for queries, opposite, teachers in ((own[0], keys[1], keys[0]), (own[1], keys[0], keys[1])):
        soft = label_smoothing * opposite.mean(0, dtype=scale.dtype).expand(len(queries), -1)
        if distillation > 0:
            # The teacher enters the value, so its mixture is not left to products of half types.
            teacher, taught_keys = teachers[rows.own].to(scale.dtype), opposite.to(scale.dtype)
            taught = _attend(teacher, taught_keys, scale, positives, 0.0, rows, gradient=True)[1]
            soft = soft + (1 - label_smoothing) * distillation * taught
        statistics, direction = _attend(queries, opposite, scale, positives, hard, rows, gradient)
        values.append((statistics.losses(rows.own, hard) - scale * (queries * soft).sum(1)).sum())
        if gradient:
            toward.append(direction.sub_(soft))
    value = values[0] + values[1]
    if not gradient:
        return (value,)
    alignment = (own[0] * toward[0]).sum() + (own[1] * toward[1]).sum()
    return value, *toward, alignment


def _attend(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    positives: _Positives,
    hard: float,
    rows: Rows,
    gradient: bool,
) -> tuple[_Statistics, Tensor]:
    """Statistics of this rank's rows, and (softmax of the rows - hard targets) keys, in one visit."""
    logits = _Logits(queries, keys, scale)
    statistics = _Statistics(rows.total, scale)
    mixed = torch.zeros_like(queries, dtype=scale.dtype) if gradient else scale.new_empty(0)
    own, others = _spans(rows, len(keys))
    for i in own:
        for j in own + others:
            tile = logits.tile(_within(i, rows), j)
            exponentials, shrink = statistics.add(i, tile, positives.total(tile, i, j, 1), 1)
            if gradient:
                mixed[_within(i, rows)] *= shrink[:, None]
                _add_product(mixed[_within(i, rows)], exponentials, keys[j])
    if gradient:
        mixed *= statistics.reciprocal(rows.own)[:, None]
        for i in own:
            for j in own + others:
                positives.subtract_keys(mixed[_within(i, rows)], keys, i, j, hard)
    return statistics, mixed


class _Logits:
    """Tiles of ``scale queries keys^T``: the first ``keep`` are kept, the others computed on every visit."""

    def __init__(self, queries: Tensor, keys: Tensor, scale: Tensor, keep: int = 0):
        self.queries, self.keys, self.scale = queries, keys, scale
        self._keep = keep
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._workspace: Tensor | None = None

    def tile(self, i: slice, j: slice) -> Tensor:
        place = i.start, j.start
        if place in self._kept:
            return self._kept[place]
        queries, keys = self.queries[i].to(self.scale.dtype), self.keys[j].to(self.scale.dtype)
        out = self._memory(len(queries), len(keys))
        torch.mm(self.scale * queries, keys.T, out=out)
        if len(self._kept) < self._keep:
            self._kept[place] = out
        return out

    def _memory(self, rows: int, columns: int) -> Tensor:
        if len(self._kept) < self._keep:
            return self.scale.new_empty(rows, columns)
        if self._workspace is None:
            self._workspace = _tile_memory(self.scale)
        return self._workspace[: rows * columns].view(rows, columns)


class _Positives:
    """Hard targets: keys with the label of the query in equal shares, without labels its own key alone."""

    def __init__(self, labels: Tensor | None, like: Tensor):
        self.labels = labels
        if labels is not None:
            ordered = labels.sort().values
            equal = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
            self.share = equal.to(like.dtype).reciprocal_()

    def total(self, logits: Tensor, i: slice, j: slice, dim: int) -> Tensor | None:
        """Sum of targets times logits along ``dim`` of a tile; ``None`` when it holds no target."""
        if self.labels is None:
            return logits.diagonal() if i == j else None
        return (logits * self._targets(i, j)).sum(dim)

    def subtract(self, tile: Tensor, i: slice, j: slice, amount: float) -> Tensor:
        if self.labels is not None:
            tile.sub_(self._targets(i, j), alpha=amount)
        elif i == j:
            tile.diagonal().sub_(amount)
        return tile

    def subtract_keys(self, mixed: Tensor, keys: Tensor, i: slice, j: slice, amount: float) -> None:
        """``mixed -= amount * targets keys`` for the queries ``i`` and the keys ``j``."""
        if amount == 0:
            return
        if self.labels is not None:
            _add_product(mixed, self._targets(i, j), keys[j], alpha=-amount)
        elif i == j:
            mixed.sub_(keys[j], alpha=amount)

    def _targets(self, i: slice, j: slice) -> Tensor:
        return (self.labels[i, None] == self.labels[j]) * self.share[j]


class _Statistics:
    """Softmax statistics of many rows (or columns) of logits, whose tiles arrive one after another."""

    def __init__(self, length: int, like: Tensor):
        self.largest = like.new_full((length,), -torch.inf)
        self.total, self.positive = like.new_zeros(2, length)
        self._workspace = _tile_memory(like)

    def add(self, span: slice, logits: Tensor, positive: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
        """Take one tile in; returns its exponentials and the factor by which earlier ones shrank."""
        largest = torch.maximum(self.largest[span], logits.amax(dim))
        shrink = (self.largest[span] - largest).exp_()
        self.largest[span] = largest
        exponentials = self.exponentials(span, logits, dim)
        self.total[span] = self.total[span] * shrink + exponentials.sum(dim)
        if positive is not None:
            self.positive[span] += positive
        return exponentials, shrink

    def exponentials(self, span: slice, logits: Tensor, dim: int) -> Tensor:
        """Exponentials of a tile relative to the largest logits, in memory that the next tile takes over."""
        out = self._workspace[: logits.numel()].view_as(logits)
        return torch.sub(logits, self.largest[span].unsqueeze(dim), out=out).exp_()

    def losses(self, span: slice, hard: float) -> Tensor:
        """Log-sum-exp minus ``hard`` positive logits; large equal numbers cancel before small ones join."""
        return (self.largest[span] - hard * self.positive[span]) + self.total[span].log()

    def reciprocal(self, span: slice) -> Tensor:
        return self.total[span].reciprocal()

    def over_ranks(self, rows: Rows) -> _Statistics:
        """Join what the ranks saw of the same columns."""
        if rows.group is not None:
            mine = self.largest.clone()
            collectives.max_over_ranks(self.largest, rows)
            self.total *= mine.sub_(self.largest).exp_()
            self.total, self.positive = collectives.sum_over_ranks(
                torch.stack((self.total, self.positive)), rows
            )
        return self

    def over_rows(self, rows: Rows) -> _Statistics:
        """Join the rows of all ranks."""
        if rows.group is not None:
            own = torch.stack((self.largest[rows.own], self.total[rows.own]), dim=1)
            self.largest, self.total = collectives.gather_rows(own, rows).T.contiguous()
        return self


def _tile_memory(like: Tensor) -> Tensor:
    """Memory for one tile, used again and again: fresh memory would cost page faults on every tile."""
    return like.new_empty(TILE * TILE)


def _add_product(total: Tensor, weights: Tensor, features: Tensor, alpha: float = 1.0) -> None:
    """``total += alpha weights features``; bfloat16 multiplies as such (float16 would lose small weights)."""
    if features.dtype == torch.bfloat16:
        total.add_(weights.to(features.dtype) @ features, alpha=alpha)
    else:
        total.addmm_(weights, features.to(total.dtype), alpha=alpha)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _spans(rows: Rows, length: int) -> tuple[list[slice], list[slice]]:
    """Tiles of this rank's rows, then tiles of all others, so that positives lie on diagonals of tiles."""
    return _tiles(rows.start, rows.stop), _tiles(0, rows.start) + _tiles(rows.stop, length)


def _tiles(start: int, stop: int) -> list[slice]:
    return [slice(first, min(first + TILE, stop)) for first in range(start, stop, TILE)]


def _within(span: slice, rows: Rows) -> slice:
    return slice(span.start - rows.start, span.stop - rows.start)
