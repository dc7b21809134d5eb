"""The sigmoid loss over tiles of pairs: never the N x N matrix, and gradients come out of the only visit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlkernels.core import collectives, pairs

TILE = 1024


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels: Tensor | None,
    group: str,
    rank_counts: Sequence[int] | None,
    rank_reduction: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of features, logit_scale and logit_bias), gradients empty when not wanted."""
    rows = pairs.locate_pairs(image_features, collectives.named_group(group), rank_counts)
    images, texts = (collectives.gather_rows(features, rows) for features in (image_features, text_features))
    every_label = None if labels is None else collectives.gather_rows(labels, rows)
    tiles = _Tiles(images, texts, logit_scale, logit_bias, every_label)
    toward_image, toward_text = (tiles.scale.new_zeros(image_features.shape) for _ in range(2))
    value, of_scale, of_bias = tiles.scale.new_zeros(3)
    own, others = pairs.spans(rows, TILE)
    for i in own:
        for j in own + others:
            value += tiles.losses(i, j).sum()
            if gradient:
                weights = tiles.gradient(i, j)
                of_bias += weights.sum()
                of_scale += tiles.alignment().sum()
                pairs.add_product(toward_image[pairs.within(i, rows)], weights, texts[j])
                if j in own:
                    pairs.add_product(toward_text[pairs.within(j, rows)], weights.T, images[i])
    mean = 1 / rows.total
    loss = collectives.sum_over_ranks(value, rows) * mean
    if not gradient:
        return loss, *(loss.new_empty(0) for _ in range(4))
    for i in others:
        for j in own:
            tiles.logits(i, j)
            pairs.add_product(toward_text[pairs.within(j, rows)], tiles.gradient(i, j).T, images[i])
    factor = mean * pairs.gradient_factor(rows, rank_reduction)
    of_features = tiles.scale * factor
    of_numbers = ((of_scale * factor).reshape(logit_scale.shape), (of_bias * factor).reshape(logit_bias.shape))
    return loss, toward_image.mul_(of_features), toward_text.mul_(of_features), *of_numbers


class _Tiles:
    """One tile of pairs at a time, in memory that the next one takes over (fresh memory would cost page faults)."""

    def __init__(self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, labels: Tensor | None):
        dtype = pairs.wide(images)
        self.images, self.texts, self.labels = images, texts, labels
        self.scale, self.bias = scale.reshape(()).to(dtype), bias.reshape(()).to(dtype)
        self._zero = self.scale.new_zeros(())
        length = min(TILE, len(images))
        self._memory = self.scale.new_empty(3, length * length)

    def logits(self, i: slice, j: slice) -> Tensor:
        """Logits, negated where the pair is positive: each pair's loss is then ``log(1 + exp(logit))``."""
        images, texts = self.images[i].to(self.scale.dtype), self.texts[j].to(self.scale.dtype)
        shape = len(images), len(texts)
        self._similarities, self._logits, self._other = (
            memory[: shape[0] * shape[1]].view(shape) for memory in self._memory
        )
        torch.mm(images, texts.T, out=self._similarities)
        torch.mul(self._similarities, self.scale, out=self._logits).add_(self.bias)
        return self._negate_positives(self._logits, i, j)

    def losses(self, i: slice, j: slice) -> Tensor:
        return torch.logaddexp(self.logits(i, j), self._zero, out=self._other)

    def gradient(self, i: slice, j: slice) -> Tensor:
        """Derivatives of the last tile's losses by its logits, in the logits' place."""
        return self._negate_positives(self._logits.sigmoid_(), i, j)

    def alignment(self) -> Tensor:
        """The last tile's derivatives times its similarities: shares of the gradient of the scale."""
        return torch.mul(self._logits, self._similarities, out=self._other)

    def _negate_positives(self, tile: Tensor, i: slice, j: slice) -> Tensor:
        if self.labels is not None:
            signs = (self.labels[i, None] != self.labels[j]).to(tile.dtype).mul_(2).sub_(1)
            return tile.mul_(signs)
        if i == j:
            tile.diagonal().neg_()
        return tile
