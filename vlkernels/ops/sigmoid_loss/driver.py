"""The sigmoid loss over ranks: whose rows meet which, what is joined and what it is multiplied by.

The arithmetic of two blocks on one device is a :class:`Tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from vlkernels.core import collectives, pairs
from vlkernels.core.exchange import Block, form_gradients, make_side, meetings


class Tiles(Protocol):
    """The pairs of an image block and a text block; an object serves one call."""

    def meet(
        self, images: Block, texts: Block, sums: Tensor | None, toward_image: Tensor | None, toward_text: Tensor | None
    ) -> None:
        """Add what the blocks' pairs give to those tensors that are there, with g the derivatives of losses by logits.

        ``sums``, float64: losses, g times products (the scale's gradient), g (the bias's); the latter two only beside
        gradients of features. ``toward_image``: g texts. ``toward_text``: g^T images.
        """


MakeTiles = Callable[[Tensor, Tensor, Tensor | None], Tiles]  # scale, bias, labels of all ranks


def sigmoid_loss(
    make_tiles: MakeTiles,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels: Tensor | None,
    group: str,
    rank_counts: Sequence[int] | None,
    rank_reduction: str,
    exchange: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of features, logit_scale and logit_bias), gradients empty when not wanted."""
    options = {"exchange": exchange, "requires_grad": gradient, "labels": labels}
    rows = pairs.locate_pairs(image_features, collectives.named_group(group), rank_counts, **options)
    scale, bias = (number.reshape(()).to(pairs.wide(image_features)) for number in (logit_scale, logit_bias))
    every_label = None if labels is None else collectives.gather_rows(labels, rows)
    tiles = make_tiles(scale, bias, every_label)
    images, texts = (make_side(exchange, features, rows) for features in (image_features, text_features))
    sums = scale.new_zeros(3, dtype=torch.float64)  # terms of both signs all but cancel in the gradient of the scale
    mean = 1 / rows.total
    if not gradient:
        for image_block, text_block in meetings(images, texts):
            tiles.meet(image_block, text_block, sums, None, None)
        loss = collectives.sum_over_ranks(sums[0].to(scale.dtype), rows) * mean
        return loss, *(loss.new_empty(0) for _ in range(4))

    def meet(image_block: Block, text_block: Block, toward_image: Tensor | None, toward_text: Tensor | None) -> None:
        of_own_images = None if toward_image is None else sums  # another rank counts its own
        tiles.meet(image_block, text_block, of_own_images, toward_image, toward_text)

    toward_image, toward_text = form_gradients(images, texts, scale.dtype, meet)
    factor = mean * pairs.gradient_factor(rows, rank_reduction)
    loss = collectives.sum_over_ranks(sums[0].to(scale.dtype), rows) * mean
    of_features = scale * factor
    of_numbers = (
        (total * factor).to(scale.dtype).reshape(number.shape) for total, number in zip(sums[1:], (logit_scale, logit_bias))
    )
    return loss, toward_image.mul_(of_features), toward_text.mul_(of_features), *of_numbers
