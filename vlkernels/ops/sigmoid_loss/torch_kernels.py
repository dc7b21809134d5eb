"""The sigmoid loss over tiles of pairs: never the N x N matrix, and gradients come out of the only visit."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vlkernels.core import pairs
from vlkernels.core.exchange import Block
from vlkernels.core.products import multiply
from vlkernels.ops.sigmoid_loss import driver

TILE = 1024


class Tiles:
    """One tile of pairs at a time, in memory that the next one takes over (fresh memory would cost page faults)."""

    def __init__(self, scale: Tensor, bias: Tensor, labels: Tensor | None):
        self._scale, self._bias, self._labels = scale, bias, labels
        self._zero = scale.new_zeros(())
        self._memory = scale.new_empty(3, 0)

    def meet(
        self, images: Block, texts: Block, sums: Tensor | None, toward_image: Tensor | None, toward_text: Tensor | None
    ) -> None:
        self._memory = pairs.at_least(self._memory, images, texts, TILE)
        gradient = toward_image is not None or toward_text is not None
        for i in images.cut(TILE):
            for j in texts.cut(TILE):
                self._find_logits(i, j)
                if sums is not None:
                    sums[0] += torch.logaddexp(self._logits, self._zero, out=self._other).sum()
                if not gradient:
                    continue
                weights = self._derivatives(i, j)
                if sums is not None:
                    sums[1] += torch.mul(weights, self._products, out=self._other).sum()
                    sums[2] += weights.sum()
                if toward_image is not None:
                    pairs.add_product(toward_image[images.within(i)], weights, j.features)
                if toward_text is not None:
                    pairs.add_product(toward_text[texts.within(j)], weights.T, i.features)

    def _find_logits(self, i: Block, j: Block) -> None:
        """Logits, negated where the pair is positive: each pair's loss is then ``log(1 + exp(logit))``."""
        images, texts = i.features.to(self._scale.dtype), j.features.to(self._scale.dtype)
        shape = len(images), len(texts)
        self._products, self._logits, self._other = (
            memory[: shape[0] * shape[1]].view(shape) for memory in self._memory
        )
        multiply(images, texts.T, self._products)
        torch.mul(self._products, self._scale, out=self._logits).add_(self._bias)
        self._negate_positives(self._logits, i, j)

    def _derivatives(self, i: Block, j: Block) -> Tensor:
        """Of the tile's losses by its logits, in the logits' place."""
        return self._negate_positives(self._logits.sigmoid_(), i, j)

    def _negate_positives(self, tile: Tensor, i: Block, j: Block) -> Tensor:
        if self._labels is not None:
            signs = (self._labels[i.span, None] != self._labels[j.span]).to(tile.dtype).mul_(2).sub_(1)
            return tile.mul_(signs)
        pairs.partners(tile, i, j).neg_()
        return tile


sigmoid_loss = partial(driver.sigmoid_loss, Tiles)
