"""The triplet loss over ranks: whose rows meet which, what is joined and what it is multiplied by.

The arithmetic of two blocks on one device is a :class:`Tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from vlkernels.core import collectives, pairs
from vlkernels.core.collectives import Rows
from vlkernels.core.exchange import Block, form_gradients, make_side, meetings

Pair = tuple[Tensor, Tensor]


class Hardest:
    """The largest similarity of every row (or column) to a negative, and the first place where it stands.

    Indexed by numbers in the batch of all ranks, as the places are. ``push`` is 1 where the hinge costs.
    """

    def __init__(self, like: Tensor):
        self.similarity = torch.full_like(like, -torch.inf)
        self.place = torch.zeros_like(like, dtype=torch.int64)
        self.push = torch.zeros_like(like)


class Tiles(Protocol):
    """The similarities of an image block and a text block; an object serves one call. Gradients are added."""

    def hardest(self, images: Block, texts: Block, of_images: Hardest, of_texts: Hardest) -> None:
        """Take the blocks' negatives in; blocks may come in any order."""

    def push_hardest(
        self,
        images: Block,
        texts: Block,
        of_images: Hardest,
        of_texts: Hardest,
        toward_image: Tensor | None,
        toward_text: Tensor | None,
    ) -> None:
        """Every row that pushes, and its hardest negative, where both lie in these blocks, take each other's features."""

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
        """Add what negatives exceed the ``least`` similarity that costs, of their row and of their column, to ``value``.

        ``pushes`` counts such negatives by row and by column; both sides take each other's features as often.
        """


MakeTiles = Callable[[Tensor | None, Tensor], Tiles]  # labels of all ranks; a tensor of the similarities' dtype and device


def triplet_loss(
    make_tiles: MakeTiles,
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor | None,
    margin: float,
    hardest: bool,
    group: str,
    rank_counts: Sequence[int] | None,
    rank_reduction: str,
    exchange: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradients of image_features and text_features), gradients empty when not wanted."""
    options = {"exchange": exchange, "requires_grad": gradient, "labels": labels, "hardest": hardest, "margin": margin}
    rows = pairs.locate_pairs(image_features, collectives.named_group(group), rank_counts, **options)
    own = image_features, text_features
    partners = collectives.gather_rows(_similarities_of_partners(*own), rows)
    tiles = make_tiles(None if labels is None else collectives.gather_rows(labels, rows), partners)
    loss, *toward = (_hardest if hardest else _summed)(tiles, own, partners, margin, rows, exchange, gradient)
    if not gradient:
        return loss, loss.new_empty(0), loss.new_empty(0)
    factor = pairs.gradient_factor(rows, rank_reduction)
    return loss, toward[0].mul_(factor), toward[1].mul_(factor)


def _hardest(
    tiles: Tiles, own: Pair, partners: Tensor, margin: float, rows: Rows, exchange: str, gradient: bool
) -> tuple[Tensor, ...]:
    """One visit finds the hardest negative of every image and of every text; the gradients need O(N D) after it."""
    images, texts = (make_side(exchange, features, rows) for features in own)
    of_images, of_texts = Hardest(partners), Hardest(partners)
    for image_block, text_block in meetings(images, texts):
        tiles.hardest(image_block, text_block, of_images, of_texts)
    _join(of_images, of_texts, rows)
    value = partners.new_zeros(())
    for side in (of_images, of_texts):
        hinges = (side.similarity - partners + margin).relu_()
        value += hinges.sum()
        side.push = (hinges > 0).to(partners.dtype)
    if not gradient:
        return (value,)

    def meet(image_block: Block, text_block: Block, *toward: Tensor | None) -> None:
        tiles.push_hardest(image_block, text_block, of_images, of_texts, *toward)

    toward = form_gradients(images, texts, partners.dtype, meet)
    return value, *_leave_partners(toward, own, (of_images.push + of_texts.push)[rows.own, None])


def _summed(
    tiles: Tiles, own: Pair, partners: Tensor, margin: float, rows: Rows, exchange: str, gradient: bool
) -> tuple[Tensor, ...]:
    """Every negative within the margin of a partner, of its image's and of its text's."""
    least = partners - margin
    images, texts = (make_side(exchange, features, rows) for features in own)
    value, pushes = least.new_zeros(()), torch.zeros_like(least)
    if not gradient:
        for image_block, text_block in meetings(images, texts):
            tiles.summed(image_block, text_block, least, value, None, None, None)
        return (collectives.sum_over_ranks(value, rows),)

    def meet(image_block: Block, text_block: Block, toward_image: Tensor | None, toward_text: Tensor | None) -> None:
        counted = (value, pushes) if toward_image is not None else (None, None)  # another rank counts its own
        tiles.summed(image_block, text_block, least, *counted, toward_image, toward_text)

    toward = form_gradients(images, texts, least.dtype, meet)
    mine = collectives.sum_over_ranks(pushes, rows)[rows.own, None]
    return collectives.sum_over_ranks(value, rows), *_leave_partners(toward, own, mine)


def _similarities_of_partners(images: Tensor, texts: Tensor) -> Tensor:
    return (images * texts.to(pairs.wide(images))).sum(1)


def _leave_partners(toward: Pair, own: Pair, pushes: Tensor) -> Pair:
    """Each push of a row towards a negative is one away from the partner, for both."""
    return toward[0].sub_(pushes * own[1]), toward[1].sub_(pushes * own[0])


def _join(of_images: Hardest, of_texts: Hardest, rows: Rows) -> None:
    """Join what the ranks saw of all rows and columns; of equal similarities the first place stands."""
    if rows.group is None:
        return
    sides = of_images, of_texts
    similarities = collectives.max_over_ranks(torch.stack([side.similarity for side in sides]), rows)
    nowhere = 1 - rows.total
    negated = [
        torch.where(side.similarity == joined, -side.place, nowhere)
        for side, joined in zip(sides, similarities, strict=True)
    ]
    places = -collectives.max_over_ranks(torch.stack(negated), rows)
    for side, similarity, place in zip(sides, similarities, places, strict=True):
        side.similarity, side.place = similarity, place
