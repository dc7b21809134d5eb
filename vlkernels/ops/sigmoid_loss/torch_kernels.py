"""The sigmoid loss over tiles of pairs: never the N x N matrix, and gradients come out of the only visit."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vlkernels.core import pairs
from vlkernels.core.exchange import Block
from vlkernels.core.products import multiply
from vlkernels.ops.sigmoid_loss import cpu, driver

TILE = 2048


class Tiles:
    """One tile of pairs at a time, in memory that the next one takes over (fresh memory would cost page faults)."""

    parts = 3  # similarities, logits, what is summed

    def __init__(self, scale: Tensor, bias: Tensor, labels: Tensor | None):
        self._scale, self._bias, self._labels = scale, bias, labels
        self._zero = scale.new_zeros(())
        self._memory = scale.new_empty(self.parts, 0)

    def meet(
        self, images: Block, texts: Block, sums: Tensor | None, toward_image: Tensor | None, toward_text: Tensor | None
    ) -> None:
        self._memory = pairs.at_least(self._memory, images, texts, TILE)
        gradient = toward_image is not None or toward_text is not None
        for i in images.cut(TILE):
            for j in texts.cut(TILE):
                weights = self._weigh(i, j, sums, gradient)
                if toward_image is not None:
                    pairs.add_product(toward_image[images.within(i)], weights, j.features)
                if toward_text is not None:
                    pairs.add_product(toward_text[texts.within(j)], weights.T, i.features)

    def _weigh(self, i: Block, j: Block, sums: Tensor | None, gradient: bool) -> Tensor:
        """Take a tile into the sums; returns the derivatives of its losses by its logits, if there are to be gradients."""
        products, logits, other = self._views(i, j)
        self._find_products(i, j, products)
        # Negated where the pair is positive: each pair's loss is then log(1 + exp(logit)).
        torch.mul(products, self._scale, out=logits).add_(self._bias)
        self._negate_positives(logits, i, j)
        if sums is not None:
            sums[0] += _sum(torch.logaddexp(logits, self._zero, out=other))
        if not gradient:
            return logits
        weights = self._negate_positives(logits.sigmoid_(), i, j)
        if sums is not None:
            sums[1] += _sum(torch.mul(weights, products, out=other))
            sums[2] += _sum(weights)
        return weights

    def _views(self, i: Block, j: Block) -> list[Tensor]:
        shape = len(i.features), len(j.features)
        return [memory[: shape[0] * shape[1]].view(shape) for memory in self._memory]

    def _find_products(self, i: Block, j: Block, out: Tensor) -> None:
        multiply(i.features.to(out.dtype), j.features.to(out.dtype).T, out)

    def _negate_positives(self, tile: Tensor, i: Block, j: Block) -> Tensor:
        if self._labels is not None:
            signs = (self._labels[i.span, None] != self._labels[j.span]).to(tile.dtype).mul_(2).sub_(1)
            return tile.mul_(signs)
        pairs.partners(tile, i, j).neg_()
        return tile


class CompiledTiles(Tiles):
    """Everything between two products in one compiled pass over a tile, in float32 on a CPU."""

    parts = 1

    def __init__(self, scale: Tensor, bias: Tensor, labels: Tensor | None):
        super().__init__(scale, bias, labels)
        self._ids = None if labels is None else labels.unique(return_inverse=True)[1].int()

    def _weigh(self, i: Block, j: Block, sums: Tensor | None, gradient: bool) -> Tensor:
        (tile,) = self._views(i, j)
        self._find_products(i, j, tile)
        of_tile = cpu.weigh_pairs(tile, self._ids_of(i), self._ids_of(j), self._scale, self._bias, gradient)
        if sums is not None:
            sums += of_tile
        return tile

    def _ids_of(self, block: Block) -> Tensor:
        """Equal for positive pairs."""
        if self._ids is None:
            return torch.arange(block.start, block.span.stop, dtype=torch.int32)
        return self._ids[block.span]


def _sum(tile: Tensor) -> Tensor:
    """Row by row and then in float64: the same for any number of threads, which would divide a sum of all elements."""
    return tile.sum(1).sum(dtype=torch.float64)


sigmoid_loss = partial(driver.sigmoid_loss, Tiles)
compiled_sigmoid_loss = partial(driver.sigmoid_loss, CompiledTiles)
