"""The contrastive loss over tiles of logits: never the N x N matrix, and gradients come with the value."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vlkernels.core import pairs
from vlkernels.core.exchange import Block
from vlkernels.core.products import multiply
from vlkernels.ops.contrastive_loss import driver
from vlkernels.ops.contrastive_loss.driver import Statistics, Targets

TILE = 2048
KEPT_TILES = 16
# Rows and columns of a tile whose largest logits lie no further apart share one exponential: what then vanishes in float32
# is less than a rounding of anything it is added to.
WIDEST = 60.0


class Tiles:
    """Tiles of ``scale images texts^T``: the first ones are kept for the gradients, the others computed on every visit."""

    alignment = None  # gradients here are exact enough

    def __init__(self, scale: Tensor, targets: Targets, gradient: bool):
        self.scale = scale
        self._targets = targets
        self._room = KEPT_TILES if gradient else 0
        self._kept: dict[tuple[int, int], Tensor | Softmax] = {}
        # Memory for one tile each, used again and again: fresh memory would cost page faults on every tile.
        self._logits, self._of_rows, self._of_columns = (scale.new_empty(TILE * TILE) for _ in range(3))

    def statistics(self, images: Block, texts: Block, of_images: Statistics, of_texts: Statistics) -> None:
        for i in images.cut(TILE):
            for j in texts.cut(TILE):
                tile = self._tile(i, j, keep=True, share=True)
                if isinstance(tile, Softmax):
                    _join(of_images, i, tile.largest, tile.total)
                    _join(of_texts, j, tile.column_largest, tile.column_total)
                else:
                    self._take(of_images, i, j, tile, 1)
                    self._take(of_texts, i, j, tile, 0)

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
        for i in images.cut(TILE):
            for j in texts.cut(TILE):
                tile = self._tile(i, j, share=True)
                if isinstance(tile, Softmax):
                    gradient = self._of_both(tile, i, j, of_images, of_texts)
                else:
                    gradient = self._exponentials(of_images, i, tile, 1)
                    gradient.mul_(of_images.total[i.span, None].reciprocal())
                    columns = self._exponentials(of_texts, j, tile, 0)
                    gradient.addcmul_(columns, of_texts.total[j.span].reciprocal())
                    self._subtract_targets(gradient, i, j, 2 * hard)
                if toward_image is not None:
                    pairs.add_product(toward_image[images.within(i)], gradient, j.features)
                if toward_text is not None:
                    pairs.add_product(toward_text[texts.within(j)], gradient.T, i.features)

    def attend(
        self, queries: Block, keys: Block, of_queries: Statistics, mixed: Tensor | None, wanted: Tensor | None
    ) -> None:
        for i in queries.cut(TILE):
            for j in keys.cut(TILE):
                logits = self._tile(i, j)
                exponentials, shrink = self._take(of_queries, i, j, logits, 1)
                if mixed is not None:
                    mixed[queries.within(i)] *= shrink[:, None]
                    pairs.add_product(mixed[queries.within(i)], exponentials, j.features)
                if wanted is not None:
                    pairs.add_product(wanted[queries.within(i)], self._shares(i, j), j.features)

    def _tile(self, i: Block, j: Block, keep: bool = False, share: bool = False) -> Tensor | Softmax:
        """The logits of a tile or, with ``share``, their softmax where no target is in it and the tile is not too wide."""
        place = i.start, j.start
        if place in self._kept:
            return self._kept[place]
        queries, keys = i.features.to(self.scale.dtype), j.features.to(self.scale.dtype)
        shape = len(queries), len(keys)
        keep = keep and len(self._kept) < self._room
        kept = self.scale.new_empty(shape) if keep else None
        # Whether a tile is too wide is asked on the host, which a device would have to wait for.
        share = share and self.scale.device.type == "cpu" and self._targets.labels is None and not _meet(i, j)
        logits = self._logits[: shape[0] * shape[1]].view(shape) if share or kept is None else kept
        multiply(self.scale * queries, keys.T, logits)
        tile: Tensor | Softmax = logits
        if share:
            memory = self._of_columns[: logits.numel()].view(shape) if kept is None else kept
            tile = softmax_of_tile(logits, memory) or (logits if kept is None else kept.copy_(logits))
        if keep:
            self._kept[place] = tile
        return tile

    def _of_both(self, tile: Softmax, i: Block, j: Block, of_images: Statistics, of_texts: Statistics) -> Tensor:
        """Softmax over rows + softmax over columns of all logits, from that of a tile's rows."""
        out = self._of_rows[: tile.shares.numel()].view_as(tile.shares)
        lower = tile.total * (tile.largest - of_images.largest[i.span]).exp_()
        of_rows = lower / of_images.total[i.span]
        of_columns = (tile.top - of_texts.largest[j.span]).exp_() / of_texts.total[j.span]
        return torch.addcmul(of_rows[:, None], tile.weight[:, None], of_columns, out=out).mul_(tile.shares)

    def _take(self, statistics: Statistics, i: Block, j: Block, logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Take one tile into the statistics of its rows (1) or columns (0).

        Returns its exponentials, and the factor by which those of earlier tiles shrank.
        """
        side = i if dim == 1 else j
        largest = torch.maximum(statistics.largest[side.span], logits.amax(dim))
        shrink = (statistics.largest[side.span] - largest).exp_()
        statistics.largest[side.span] = largest
        exponentials = self._exponentials(statistics, side, logits, dim)
        statistics.total[side.span] = statistics.total[side.span] * shrink + exponentials.sum(dim)
        if self._targets.labels is not None:
            statistics.positive[side.span] += (logits * self._shares(i, j)).sum(dim)
        else:
            statistics.positive[pairs.shared(i, j)] += pairs.partners(logits, i, j)
        return exponentials, shrink

    def _exponentials(self, statistics: Statistics, side: Block, logits: Tensor, dim: int) -> Tensor:
        """Exponentials of a tile relative to the largest logits, in memory that the next tile takes over."""
        memory = self._of_rows if dim == 1 else self._of_columns
        out = memory[: logits.numel()].view_as(logits)
        return torch.sub(logits, statistics.largest[side.span].unsqueeze(dim), out=out).exp_()

    def _subtract_targets(self, tile: Tensor, i: Block, j: Block, amount: float) -> None:
        if self._targets.labels is not None:
            tile.sub_(self._shares(i, j), alpha=amount)
        else:
            pairs.partners(tile, i, j).sub_(amount)

    def _shares(self, i: Block, j: Block) -> Tensor:
        """Targets: keys of the query's label in equal shares."""
        labels, share = self._targets.labels, self._targets.share
        return (labels[i.span, None] == labels[j.span]) * share[j.span]


class Softmax(NamedTuple):
    """A tile as the softmax of its rows, whose sums of exponentials relative to ``largest`` are ``total``.

    ``shares * weight[:, None]`` are exponentials relative to ``top``, the largest logit of all: columns need no others.
    """

    shares: Tensor
    largest: Tensor
    total: Tensor
    top: Tensor
    weight: Tensor
    column_largest: Tensor
    column_total: Tensor


def softmax_of_tile(logits: Tensor, out: Tensor) -> Softmax | None:
    """The softmax of a tile, its shares written into ``out``; ``None`` where it is too wide."""
    largest, column_largest = logits.amax(1), logits.amax(0)
    top = largest.max()
    if top - torch.minimum(largest.min(), column_largest.min()) > WIDEST:
        return None
    torch.ops.aten._softmax.out(logits, 1, False, out=out)
    total = out.amax(1).reciprocal_()
    weight = total * (largest - top).exp_()
    column_total = (weight @ out).mul_((top - column_largest).exp_())
    return Softmax(out, largest, total, top, weight, column_largest, column_total)


def _join(statistics: Statistics, side: Block, largest: Tensor, total: Tensor) -> None:
    """Take the statistics of a tile's rows or columns into those of all."""
    before = statistics.largest[side.span]
    after = torch.maximum(before, largest)
    shrunk = statistics.total[side.span] * (before - after).exp_()
    statistics.total[side.span] = shrunk.addcmul_(total, (largest - after).exp_())
    statistics.largest[side.span] = after


def _meet(images: Block, texts: Block) -> bool:
    both = pairs.shared(images, texts)
    return both.stop > both.start


contrastive_loss = partial(driver.contrastive_loss, Tiles)
