"""The triplet loss over tiles of pairs: never the N x N matrix, and gradients come with the value."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from vlkernels.core import pairs
from vlkernels.core.exchange import Block
from vlkernels.core.products import multiply
from vlkernels.ops.triplet_loss import driver
from vlkernels.ops.triplet_loss.driver import Hardest

TILE = 1024


class Tiles:
    """One tile of pairs at a time, in memory that the next one takes over (fresh memory would cost page faults)."""

    def __init__(self, labels: Tensor | None, like: Tensor):
        self._labels, self._dtype = labels, like.dtype
        self._memory = like.new_empty(3, 0)

    def hardest(self, images: Block, texts: Block, of_images: Hardest, of_texts: Hardest) -> None:
        self._memory = pairs.at_least(self._memory, images, texts, TILE)
        for i in images.cut(TILE):
            for j in texts.cut(TILE):
                negatives = self._negatives(i, j)
                _take(of_images, i.span, negatives, j.start)
                # Columns as rows: a copy and its maxima cost half of the maxima over columns.
                turned = self._part(1, negatives.T.shape).copy_(negatives.T)
                _take(of_texts, j.span, turned, i.start)

    def push_hardest(
        self,
        images: Block,
        texts: Block,
        of_images: Hardest,
        of_texts: Hardest,
        toward_image: Tensor | None,
        toward_text: Tensor | None,
    ) -> None:
        _push(images, texts, of_images, toward_image, toward_text)
        _push(texts, images, of_texts, toward_text, toward_image)

    def summed(
        self,
        images: Block,
        texts: Block,
        least: Tensor,
        value: Tensor | None,
        pushes: Tensor | None,
        toward_image: Tensor | None,
        toward_text: Tensor | None,
    ) -> None:
        self._memory = pairs.at_least(self._memory, images, texts, TILE)
        for i in images.cut(TILE):
            for j in texts.cut(TILE):
                negatives = self._negatives(i, j)
                bounds = least[i.span, None], least[j.span]
                if value is not None:
                    value += sum(self._excess(negatives, bound).sum() for bound in bounds)
                if toward_image is None and toward_text is None:
                    continue
                of_images, of_texts = self._exceeding(negatives, *bounds)
                if pushes is not None:
                    pushes[i.span] += of_images.sum(1)
                    pushes[j.span] += of_texts.sum(0)
                weights = of_images.add_(of_texts)
                if toward_image is not None:
                    pairs.add_product(toward_image[images.within(i)], weights, j.features)
                if toward_text is not None:
                    pairs.add_product(toward_text[texts.within(j)], weights.T, i.features)

    def _negatives(self, i: Block, j: Block) -> Tensor:
        """Similarities, minus infinity where the pair is positive."""
        images, texts = i.features.to(self._dtype), j.features.to(self._dtype)
        out = self._part(0, (len(images), len(texts)))
        multiply(images, texts.T, out)
        if self._labels is not None:
            return out.masked_fill_(self._labels[i.span, None] == self._labels[j.span], -torch.inf)
        pairs.partners(out, i, j).fill_(-torch.inf)
        return out

    def _excess(self, negatives: Tensor, least: Tensor) -> Tensor:
        """By how much negatives exceed the ``least`` similarity that costs."""
        return torch.sub(negatives, least, out=self._part(1, negatives.shape)).relu_()

    def _exceeding(self, negatives: Tensor, *least: Tensor) -> list[Tensor]:
        """1 where negatives exceed the least similarity that costs, for each of the two."""
        return [torch.gt(negatives, each, out=self._part(k, negatives.shape)) for k, each in enumerate(least, start=1)]

    def _part(self, number: int, shape: tuple[int, ...]) -> Tensor:
        return self._memory[number, : math.prod(shape)].view(shape)


def _take(hardest: Hardest, span: slice, negatives: Tensor, start: int) -> None:
    """Take the negatives of some rows in, whose first column has the number ``start``."""
    similarity, place = negatives.max(1)
    place += start
    known, known_place = hardest.similarity[span], hardest.place[span]
    harder = (similarity > known) | ((similarity == known) & (place < known_place))
    hardest.place[span] = torch.where(harder, place, known_place)
    hardest.similarity[span] = torch.maximum(similarity, known)


def _push(rows: Block, others: Block, hardest: Hardest, toward_row: Tensor | None, toward_other: Tensor | None) -> None:
    """What the rows push, to the rows and to those of their hardest negatives that lie in ``others``."""
    place = hardest.place[rows.span] - others.start
    here = (place >= 0) & (place < len(others.features))
    # A negative that lies elsewhere is the first row with the weight 0: shapes do not depend on values.
    place = torch.where(here, place, 0)
    weights = (hardest.push[rows.span] * here)[:, None]
    if toward_row is not None:
        toward_row.addcmul_(weights, others.features[place].to(toward_row.dtype))
    if toward_other is not None:
        _add_rows(toward_other, place, weights * rows.features)


def _add_rows(total: Tensor, places: Tensor, rows: Tensor) -> None:
    """Add rows to places, some of them equal, in an order that is always the same: on a card ``index_add_`` has none."""
    if total.is_cuda:
        total.index_put_((places,), rows, accumulate=True)
    else:
        total.index_add_(0, places, rows)


triplet_loss = partial(driver.triplet_loss, Tiles)
