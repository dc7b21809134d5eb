"""The late-interaction loss over tiles of token similarities: both maxima from one visit of each tile.

No ``[N, N]`` of samples and no ``[N, N, P, T]`` of tokens is ever stored, and gradients come with the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core import collectives, pairs
from vlkernels.core.collectives import Rows
from vlkernels.ops.late_interaction_loss.reference import Side, gather_side

TILE = 1024  # tokens, padding included, of each side
KEPT_BYTES = 2**28  # of maxima and their places that wait from the first visit for the second


def late_interaction_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    logit_scale: Tensor,
    image_starts: Tensor,
    image_lengths: Tensor,
    text_starts: Tensor,
    text_lengths: Tensor,
    longest_image: int,
    longest_text: int,
    similarity: str,
    label_smoothing: float,
    group: str,
    rank_counts: Sequence[int] | None,
    rank_reduction: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of image_tokens, text_tokens and logit_scale), gradients empty when not wanted."""
    rows = collectives.locate_rows(image_lengths, collectives.named_group(group), rank_counts)
    scale = logit_scale.reshape(()).to(pairs.wide(image_tokens))
    images = _Blocks(gather_side(image_tokens, image_starts, image_lengths, longest_image, rows), rows, scale)
    texts = _Blocks(gather_side(text_tokens, text_starts, text_lengths, longest_text, rows), rows, scale)
    tiles = _Tiles(images, texts, similarity, keep=gradient)
    targets = _Targets(label_smoothing, rows.total)
    statistics = _statistics(tiles, scale, targets, rows)
    mean = 1 / max(2 * rows.total, 1)
    value = sum(of_side.losses(rows.own).sum() for of_side in statistics)
    loss = collectives.sum_over_ranks(value, rows) * mean
    if not gradient:
        return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    toward_images, toward_texts, alignment = _directions(tiles, scale, targets, statistics)
    factor = mean * pairs.gradient_factor(rows, rank_reduction)
    of_scale = (alignment * factor).to(logit_scale.dtype).reshape(logit_scale.shape)
    return loss, toward_images.mul_(scale * factor), toward_texts.mul_(scale * factor), of_scale


def _statistics(
    tiles: _Tiles, scale: Tensor, targets: _Targets, rows: Rows
) -> tuple[_Statistics, _Statistics]:
    """Of every image and every text; each rank visits its own images against all texts."""
    of_images, of_texts = _Statistics(rows.total, scale), _Statistics(rows.total, scale)
    for i, j in tiles.pairs():
        if i.own:
            tile = tiles.tile(i, j)
            of_images.add(i.samples, scale * tile.of_images, targets.between(i, j))
            of_texts.add(j.samples, scale * tile.of_texts, targets.between(j, i))
    return of_images.over_rows(rows), of_texts.over_ranks(rows)


def _directions(
    tiles: _Tiles, scale: Tensor, targets: _Targets, statistics: tuple[_Statistics, _Statistics]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the summed losses by this rank's tokens, over the scale, and this rank's share of the scale's."""
    toward_images, toward_texts = tiles.images.new_gradient(), tiles.texts.new_gradient()
    alignment = torch.zeros_like(scale)
    for i, j in tiles.pairs():
        tile = tiles.tile(i, j)
        of_images = statistics[0].softmax(i.samples, scale * tile.of_images) - targets.between(i, j)
        of_texts = statistics[1].softmax(j.samples, scale * tile.of_texts) - targets.between(j, i)
        if i.own:
            tiles.images.add(toward_images, i, tile.toward_images(i, j, of_images, of_texts))
            alignment += (of_images * tile.of_images).sum()
        if j.own:
            tiles.texts.add(toward_texts, j, tile.toward_texts(i, j, of_images, of_texts))
            alignment += (of_texts * tile.of_texts).sum()
    return toward_images, toward_texts, alignment


@dataclass(frozen=True, eq=False)
class _Block:
    """Some samples of one side, padded to the longest of them; the padding repeats a sample's last token.

    A repeated token changes no maximum, so the tile needs no mask.
    """

    samples: Tensor  # [b], their numbers in the batch of all ranks
    lengths: Tensor  # [b]
    rows: Tensor  # [b, longest] of the side's tokens
    shares: Tensor  # [b, longest]: one over the length, 0 in the padding
    tokens: Tensor  # [b * longest, D], at least float32
    own: bool

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    def narrow(self, places: Tensor) -> Tensor:
        """Places of tokens in as few bytes as hold them, never in the padding: there rounding may find the maximum."""
        longest = self.shape[1]
        dtype = torch.uint8 if longest <= 2**8 else torch.int16 if longest <= 2**15 else torch.int32
        return torch.minimum(places, self.lengths - 1).to(dtype)


class _Blocks:
    """One side of the batch in blocks of at most TILE tokens: this rank's samples, then those of all others."""

    def __init__(self, side: Side, rows: Rows, like: Tensor):
        self._side = side
        self._dtype = like.dtype
        everyone = torch.arange(rows.total, device=side.tokens.device)
        others = torch.cat((everyone[: rows.start], everyone[rows.stop :]))
        self.blocks = [*self._cut(everyone[rows.own], own=True), *self._cut(others, own=False)]

    def _cut(self, samples: Tensor, own: bool) -> Iterator[_Block]:
        """Samples of similar length share a block, so that little is padding, where the host knows lengths."""
        longest = [self._side.longest] * len(samples)
        if _known_to_host(self._side.lengths):
            order = self._side.lengths[samples].argsort(stable=True, descending=True)
            samples = samples[order]
            longest = self._side.lengths[samples].tolist()
        first = 0
        while first < len(samples):
            last = first + max(1, TILE // longest[first])
            yield self._block(samples[first:last], longest[first], own)
            first = last

    def _block(self, samples: Tensor, longest: int, own: bool) -> _Block:
        side = self._side
        place = torch.arange(longest, device=samples.device)
        lengths = side.lengths[samples].long()
        rows = side.starts[samples, None] + torch.minimum(place, lengths[:, None] - 1)
        shares = torch.where(place < lengths[:, None], lengths[:, None].to(self._dtype).reciprocal(), 0)
        return _Block(samples, lengths, rows, shares, side.tokens[rows.flatten()].to(self._dtype), own)

    def new_gradient(self) -> Tensor:
        own = self._side.tokens[self._side.own]
        return torch.zeros_like(own, dtype=self._dtype, memory_format=torch.contiguous_format)

    def add(self, gradient: Tensor, block: _Block, toward: Tensor) -> None:
        """Add a block's rows; those of the padding are zero, so every row has one term and any order will do."""
        gradient.index_add_(0, block.rows.flatten() - self._side.own.start, toward)


def _known_to_host(lengths: Tensor) -> bool:
    """Whether the host can read them without waiting for a device."""
    return lengths.device.type == "cpu"


class _Tiles:
    """Tiles of token similarities, reduced to their maxima; the first KEPT_BYTES of these stay, others are made anew."""

    def __init__(self, images: _Blocks, texts: _Blocks, similarity: str, keep: bool):
        self.images, self.texts = images, texts
        self._reduce = SIMILARITIES[similarity]
        self._room = KEPT_BYTES if keep else 0
        self._kept: dict[tuple[_Block, _Block], _MeanMax | _Max] = {}
        self._workspace: Tensor | None = None

    def pairs(self) -> Iterator[tuple[_Block, _Block]]:
        """The blocks that meet here: one of the two is this rank's."""
        return ((i, j) for i in self.images.blocks for j in self.texts.blocks if i.own or j.own)

    def tile(self, i: _Block, j: _Block) -> _MeanMax | _Max:
        if (i, j) in self._kept:
            return self._kept[i, j]
        products = self._memory(len(i.tokens), len(j.tokens), i.tokens)
        torch.mm(i.tokens, j.tokens.T, out=products)
        reduced = self._reduce(products, i, j)
        if reduced.num_bytes <= self._room:
            self._room -= reduced.num_bytes
            self._kept[i, j] = reduced
        return reduced

    def _memory(self, rows: int, columns: int, like: Tensor) -> Tensor:
        if self._workspace is None:
            longest = (max(len(b.tokens) for b in side.blocks) for side in (self.images, self.texts))
            self._workspace = like.new_empty(next(longest) * next(longest))
        return self._workspace[: rows * columns].view(rows, columns)


class _MeanMax:
    """FILIP's: the mean over a sample's tokens of the maximum over the other's, from either side."""

    def __init__(self, products: Tensor, i: _Block, j: _Block):
        self.of_images, self._text_places = self._from(products, i, j)
        self.of_texts, self._image_places = self._from(products.T.contiguous(), j, i)

    @staticmethod
    def _from(products: Tensor, own: _Block, other: _Block) -> tuple[Tensor, Tensor]:
        """``[own, other]`` similarities, and for every own token its place in each other sample."""
        best, places = products.view(*own.shape, *other.shape).max(3)
        return (best * own.shares[:, :, None]).sum(1), other.narrow(places)

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.of_images, self.of_texts, self._text_places, self._image_places))

    def toward_images(self, i: _Block, j: _Block, of_images: Tensor, of_texts: Tensor) -> Tensor:
        return self._toward(i, j, of_images, self._text_places, of_texts, self._image_places)

    def toward_texts(self, i: _Block, j: _Block, of_images: Tensor, of_texts: Tensor) -> Tensor:
        return self._toward(j, i, of_texts, self._image_places, of_images, self._text_places)

    @staticmethod
    def _toward(
        own: _Block, other: _Block, by_own: Tensor, found: Tensor, by_other: Tensor, found_by: Tensor
    ) -> Tensor:
        """Own tokens get the tokens they found, a gather, and those that found them, an owned scatter."""
        firsts = other.shape[1] * torch.arange(other.shape[0], device=found.device)
        weights = by_own[:, None, :] * own.shares[:, :, None]
        gathered = F.embedding_bag(
            (found + firsts).flatten(0, 1), other.tokens, mode="sum", per_sample_weights=weights.flatten(0, 1)
        )
        finders = torch.arange(len(other.tokens), device=found.device).expand(own.shape[0], -1)
        weights = by_other[:, None, :] * other.shares[:, :, None]
        return gathered + _owned_sum(
            found_by.flatten(0, 1).T, finders, weights.flatten(0, 1).T, other.tokens, own.shape[1]
        )


class _Max:
    """BLIP-2's: the largest similarity of any two tokens, the same from either side."""

    def __init__(self, products: Tensor, i: _Block, j: _Block):
        best, text_places = products.view(*i.shape, *j.shape).max(3)
        self.of_images, image_places = best.transpose(1, 2).contiguous().max(2)
        text_places = text_places.gather(1, image_places[:, None, :])[:, 0]
        self.of_texts = self.of_images.T
        self._image_places = i.narrow(image_places.T).T
        self._text_places = j.narrow(text_places)

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for t in (self.of_images, self._image_places, self._text_places))

    def toward_images(self, i: _Block, j: _Block, of_images: Tensor, of_texts: Tensor) -> Tensor:
        return self._toward(i, j, of_images + of_texts.T, self._image_places, self._text_places)

    def toward_texts(self, i: _Block, j: _Block, of_images: Tensor, of_texts: Tensor) -> Tensor:
        return self._toward(j, i, of_images.T + of_texts, self._text_places.T, self._image_places.T)

    @staticmethod
    def _toward(own: _Block, other: _Block, weights: Tensor, places: Tensor, other_places: Tensor) -> Tensor:
        firsts = other.shape[1] * torch.arange(other.shape[0], device=places.device)
        return _owned_sum(places, other_places + firsts, weights, other.tokens, own.shape[1])


SIMILARITIES = {"mean_max": _MeanMax, "max": _Max}


def _owned_sum(places: Tensor, sources: Tensor, weights: Tensor, tokens: Tensor, length: int) -> Tensor:
    """``[owners * length, D]``: place ``places[k, e]`` of owner k gets ``weights[k, e] tokens[sources[k, e]]``.

    Each owner sorts its entries by place, so each sum has one writer and one order.
    """
    owners, entries = places.shape
    ordered, order = places.contiguous().sort(dim=1, stable=True)
    every_place = torch.arange(length, device=places.device).to(places.dtype).repeat(owners, 1)
    firsts = torch.searchsorted(ordered, every_place)
    firsts += entries * torch.arange(owners, device=places.device)[:, None]
    return F.embedding_bag(
        sources.gather(1, order).flatten(),
        tokens,
        firsts.flatten(),
        mode="sum",
        per_sample_weights=weights.gather(1, order).flatten(),
    )


@dataclass(frozen=True)
class _Targets:
    """One on the own partner, smoothed over the batch."""

    label_smoothing: float
    total: int

    def between(self, queries: _Block, keys: _Block) -> Tensor:
        partners = (queries.samples[:, None] == keys.samples).to(queries.tokens.dtype)
        return partners.mul_(1 - self.label_smoothing).add_(self.label_smoothing / self.total)


class _Statistics:
    """Softmax statistics of all images (or all texts), whose logits arrive tile by tile."""

    def __init__(self, length: int, like: Tensor):
        self.largest = like.new_full((length,), -torch.inf)
        self.total, self.wanted = like.new_zeros(2, length)

    def add(self, samples: Tensor, logits: Tensor, targets: Tensor) -> None:
        largest = torch.maximum(self.largest[samples], logits.amax(1))
        shrunk = self.total[samples] * (self.largest[samples] - largest).exp_()
        self.largest[samples] = largest
        self.total[samples] = shrunk + (logits - largest[:, None]).exp_().sum(1)
        self.wanted[samples] += (logits * targets).sum(1)

    def losses(self, span: slice) -> Tensor:
        """Log-sum-exp minus the target's logits; large equal numbers cancel before small ones join."""
        return (self.largest[span] - self.wanted[span]) + self.total[span].log()

    def softmax(self, samples: Tensor, logits: Tensor) -> Tensor:
        return (logits - self.largest[samples, None]).exp_() / self.total[samples, None]

    def over_ranks(self, rows: Rows) -> _Statistics:
        """Join what the ranks saw of the same samples."""
        if rows.group is not None:
            mine = self.largest.clone()
            collectives.max_over_ranks(self.largest, rows)
            self.total *= mine.sub_(self.largest).exp_()
            self.total, self.wanted = collectives.sum_over_ranks(torch.stack((self.total, self.wanted)), rows)
        return self

    def over_rows(self, rows: Rows) -> _Statistics:
        """Join the samples of all ranks."""
        if rows.group is not None:
            own = torch.stack((self.largest, self.total, self.wanted), dim=1)[rows.own]
            self.largest, self.total, self.wanted = collectives.gather_rows(own, rows).T.contiguous()
        return self
