"""The triplet loss over tiles of pairs: never the N x N matrix, and gradients come with the value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlkernels.core import collectives, pairs
from vlkernels.core.collectives import Rows

TILE = 1024

Pair = tuple[Tensor, Tensor]


def triplet_loss(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor | None,
    margin: float,
    hardest: bool,
    group: str,
    rank_counts: Sequence[int] | None,
    rank_reduction: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradients of image_features and text_features), gradients empty when not wanted."""
    rows = pairs.locate_pairs(image_features, collectives.named_group(group), rank_counts)
    images, texts = (collectives.gather_rows(features, rows) for features in (image_features, text_features))
    tiles = _Tiles(images, texts, None if labels is None else collectives.gather_rows(labels, rows))
    loss, *toward = (_hardest if hardest else _summed)(tiles, margin, rows, gradient)
    if not gradient:
        return loss, loss.new_empty(0), loss.new_empty(0)
    factor = pairs.gradient_factor(rows, rank_reduction)
    return loss, toward[0].mul_(factor), toward[1].mul_(factor)


def _hardest(tiles: _Tiles, margin: float, rows: Rows, gradient: bool) -> tuple[Tensor, ...]:
    """One visit finds the hardest negative of every image and of every text; the gradients need O(N D) after it."""
    of_images, of_texts = _Hardest(tiles.partners), _Hardest(tiles.partners)
    own, others = pairs.spans(rows, TILE)
    for i in own:
        for j in own + others:
            negatives = tiles.negatives(i, j)
            of_images.add(i, negatives, j.start)
            of_texts.add(j, tiles.turned(negatives), i.start)
    _join(of_images, of_texts, rows)
    hinges = [(side.similarity - tiles.partners + margin).relu_() for side in (of_images, of_texts)]
    loss = hinges[0].sum() + hinges[1].sum()
    if not gradient:
        return (loss,)
    image_pushes, text_pushes = ((hinge > 0).to(loss.dtype)[:, None] for hinge in hinges)
    toward_image = _toward(tiles.texts, image_pushes, of_images.place, text_pushes, of_texts.place, rows)
    toward_text = _toward(tiles.images, text_pushes, of_texts.place, image_pushes, of_images.place, rows)
    return loss, toward_image, toward_text


def _toward(features: Tensor, pushes: Tensor, negatives: Tensor, met: Tensor, meets: Tensor, rows: Rows) -> Tensor:
    """Gradient of this rank's rows by the ``features`` of the other side.

    A row that pushes moves from its hardest negative to its partner; a feature that was ``met`` as the hardest negative
    of a partner moves from that side as well, and so does the partner.
    """
    wide = features.to(pushes.dtype)
    own = rows.own
    toward = pushes[own] * wide[negatives[own]] - (pushes + met)[own] * wide[own]
    mine = (meets >= rows.start) & (meets < rows.stop)
    # A feature of another rank is added to the first row with the weight 0: shapes do not depend on values.
    weights = met * mine[:, None]
    places = torch.where(mine, meets - rows.start, 0)
    return toward.index_add_(0, places, weights * wide) if len(toward) else toward


def _summed(tiles: _Tiles, margin: float, rows: Rows, gradient: bool) -> tuple[Tensor, ...]:
    """Every negative within the margin of a partner, of its image's and of its text's."""
    own, others = pairs.spans(rows, TILE)
    least = tiles.partners - margin
    toward_image, toward_text = (least.new_zeros(rows.counts[rows.rank], tiles.images.shape[1]) for _ in range(2))
    value, pushes = least.new_zeros(()), torch.zeros_like(least)
    for i in own:
        for j in own + others:
            negatives = tiles.negatives(i, j)
            value += tiles.excess(negatives, least[i, None]).sum() + tiles.excess(negatives, least[j]).sum()
            if gradient:
                of_images, of_texts = tiles.exceeding(negatives, least[i, None], least[j])
                pushes[i] += of_images.sum(1)
                pushes[j] += of_texts.sum(0)
                weights = of_images.add_(of_texts)
                pairs.add_product(toward_image[pairs.within(i, rows)], weights, tiles.texts[j])
                if j in own:
                    pairs.add_product(toward_text[pairs.within(j, rows)], weights.T, tiles.images[i])
    loss = collectives.sum_over_ranks(value, rows)
    if not gradient:
        return (loss,)
    for i in others:
        for j in own:
            of_images, of_texts = tiles.exceeding(tiles.negatives(i, j), least[i, None], least[j])
            pairs.add_product(toward_text[pairs.within(j, rows)], of_images.add_(of_texts).T, tiles.images[i])
    mine = collectives.sum_over_ranks(pushes, rows)[rows.own, None]
    return loss, toward_image.sub_(mine * tiles.texts[rows.own]), toward_text.sub_(mine * tiles.images[rows.own])


class _Tiles:
    """One tile of pairs at a time, in memory that the next one takes over (fresh memory would cost page faults)."""

    def __init__(self, images: Tensor, texts: Tensor, labels: Tensor | None):
        self.images, self.texts, self.labels = images, texts, labels
        self.dtype = pairs.wide(images)
        self.partners = (images * texts.to(self.dtype)).sum(1)
        length = min(TILE, len(images))
        self._memory = self.partners.new_empty(3, length * length)

    def negatives(self, i: slice, j: slice) -> Tensor:
        """Similarities, minus infinity where the pair is positive."""
        images, texts = self.images[i].to(self.dtype), self.texts[j].to(self.dtype)
        out = self._part(0, (len(images), len(texts)))
        torch.mm(images, texts.T, out=out)
        if self.labels is not None:
            return out.masked_fill_(self.labels[i, None] == self.labels[j], -torch.inf)
        if i == j:
            out.diagonal().fill_(-torch.inf)
        return out

    def turned(self, negatives: Tensor) -> Tensor:
        """Columns as rows: a copy and its maxima cost half of the maxima over columns."""
        return self._part(1, negatives.T.shape).copy_(negatives.T)

    def excess(self, negatives: Tensor, least: Tensor) -> Tensor:
        """By how much negatives exceed the ``least`` similarity that costs."""
        return torch.sub(negatives, least, out=self._part(1, negatives.shape)).relu_()

    def exceeding(self, negatives: Tensor, *least: Tensor) -> list[Tensor]:
        """1 where negatives exceed the least similarity that costs, for each of the two."""
        return [torch.gt(negatives, each, out=self._part(k, negatives.shape)) for k, each in enumerate(least, start=1)]

    def _part(self, number: int, shape: tuple[int, ...]) -> Tensor:
        return self._memory[number, : math.prod(shape)].view(shape)


class _Hardest:
    """The largest similarity of many rows to a negative, and the first place where it stands."""

    def __init__(self, like: Tensor):
        self.similarity = torch.full_like(like, -torch.inf)
        self.place = torch.zeros_like(like, dtype=torch.int64)

    def add(self, span: slice, negatives: Tensor, start: int) -> None:
        similarity, place = negatives.max(1)
        place += start
        known, known_place = self.similarity[span], self.place[span]
        harder = (similarity > known) | ((similarity == known) & (place < known_place))
        self.place[span] = torch.where(harder, place, known_place)
        self.similarity[span] = torch.maximum(similarity, known)


def _join(of_images: _Hardest, of_texts: _Hardest, rows: Rows) -> None:
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
