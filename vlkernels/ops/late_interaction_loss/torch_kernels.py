"""The late-interaction loss over tiles of token similarities: both maxima from one visit of each tile.

No ``[N, N]`` of samples and no ``[N, N, P, T]`` of tokens is ever stored, and gradients come with the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core import pairs
from vlkernels.core.products import multiply, outside_autocast
from vlkernels.ops.late_interaction_loss import driver
from vlkernels.ops.late_interaction_loss.driver import Samples, Targets
from vlkernels.ops.late_interaction_loss.reference import Side
from vlkernels.ops.late_interaction_loss.tiles import Tiles, place_dtype

TILE = 1024  # tokens, padding included, of each side


def salience(images: Side, texts: Side) -> tuple[Tensor, Tensor]:
    """``reference.salience`` over tiles."""
    sides, dtype = (images, texts), pairs.wide(images.tokens)
    here = [side.held() for side in sides]
    spans = [[slice(start, start + TILE) for start in range(0, len(side.tokens), TILE)] for side in sides]
    maxima: tuple[dict[int, list[Tensor]], ...] = ({}, {})  # of every block of a side, over those of the other
    with outside_autocast(images.tokens):
        for i, j in product(*spans):
            tile = images.tokens[i].to(dtype) @ texts.tokens[j].to(dtype).T
            tile = torch.where(here[0][i, None] & here[1][j], tile, -torch.inf)
            maxima[0].setdefault(i.start, []).append(tile.amax(1))
            maxima[1].setdefault(j.start, []).append(tile.amax(0))
    of_images, of_texts = (torch.cat([torch.stack(parts).amax(0) for parts in side.values()]) for side in maxima)
    return of_images, of_texts


class TorchArithmetic:
    """Blocks of at most TILE tokens and PyTorch's operators on one product of two blocks at a time."""

    def __init__(self, similarity: str, scale: Tensor):
        self._tile = SIMILARITIES[similarity]
        self._dtype = scale.dtype
        self._workspace = scale.new_empty(0)

    def blocks(self, images: Samples, texts: Samples) -> Iterator[tuple[_Block, _Block]]:
        return product(*(_cut(side, self._dtype) for side in (images, texts)))

    def bytes_of_pair(self, images: Samples, texts: Samples) -> int:
        return self._tile.bytes_of_pair(images.longest, texts.longest, self._dtype.itemsize)

    def reduce(self, i: _Block, j: _Block) -> _MeanMax | _Max:
        rows, columns = len(i.tokens), len(j.tokens)
        if rows * columns > len(self._workspace):
            self._workspace = self._workspace.new_empty(rows * columns)
        products = self._workspace[: rows * columns].view(rows, columns)
        return self._tile.of(multiply(i.tokens, j.tokens.T, products), i, j)

    def restore(self, parts: Sequence[Tensor]) -> _MeanMax | _Max:
        return self._tile(*parts)

    def toward_images(
        self, tile: _MeanMax | _Max, i: _Block, j: _Block, by_images: Tensor, by_texts: Tensor, gradient: Tensor
    ) -> None:
        i.add(tile.toward_images(i, j, by_images, by_texts), gradient)

    def toward_texts(
        self, tile: _MeanMax | _Max, i: _Block, j: _Block, by_images: Tensor, by_texts: Tensor, gradient: Tensor
    ) -> None:
        j.add(tile.toward_texts(i, j, by_images, by_texts), gradient)


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
    place: int  # no other block of its side has it

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    def narrow(self, places: Tensor) -> Tensor:
        """Places of tokens in as few bytes as hold them, never in the padding: there rounding may find the maximum."""
        return torch.minimum(places, self.lengths - 1).to(place_dtype(self.shape[1]))

    def add(self, toward: Tensor, gradient: Tensor) -> None:
        """Add to the rows; those of the padding are zero, so every row has one term and any order will do."""
        gradient.index_add_(0, self.rows.flatten(), toward)


def _cut(samples: Samples, dtype: torch.dtype) -> Iterator[_Block]:
    """Blocks of at most TILE tokens.

    Samples of similar length share a block, so that little is padding, where the host knows lengths.
    """
    order = torch.arange(len(samples.lengths), device=samples.lengths.device)
    longest = [samples.longest] * len(order)
    if _known_to_host(samples.lengths):
        order = samples.lengths.argsort(stable=True, descending=True)
        longest = samples.lengths[order].tolist()
    first = 0
    while first < len(order):
        last = first + max(1, TILE // longest[first])
        yield _block(samples, order[first:last], longest[first], samples.start + first, dtype)
        first = last


def _block(samples: Samples, chosen: Tensor, longest: int, place: int, dtype: torch.dtype) -> _Block:
    position = torch.arange(longest, device=chosen.device)
    lengths = samples.lengths[chosen].long()
    rows = samples.starts[chosen, None] + torch.minimum(position, lengths[:, None] - 1)
    shares = torch.where(position < lengths[:, None], lengths[:, None].to(dtype).reciprocal(), 0)
    tokens = samples.tokens[rows.flatten()].to(dtype)
    return _Block(samples.start + chosen, lengths, rows, shares, tokens, place)


def _known_to_host(lengths: Tensor) -> bool:
    """Whether the host can read them without waiting for a device."""
    return lengths.device.type == "cpu"


@dataclass(frozen=True, eq=False)
class _MeanMax:
    """FILIP's: the mean over a sample's tokens of the maximum over the other's, from either side."""

    of_images: Tensor  # [I, J]
    of_texts: Tensor  # [J, I]
    text_places: Tensor  # [I, longest, J]: what each image token found
    image_places: Tensor  # [J, longest, I]

    @classmethod
    def of(cls, products: Tensor, i: _Block, j: _Block) -> _MeanMax:
        of_images, text_places = cls._from(products, i, j)
        of_texts, image_places = cls._from(products.T.contiguous(), j, i)
        return cls(of_images, of_texts, text_places, image_places)

    @staticmethod
    def _from(products: Tensor, own: _Block, other: _Block) -> tuple[Tensor, Tensor]:
        """``[own, other]`` similarities, and for every own token its place in each other sample."""
        best, places = products.view(*own.shape, *other.shape).max(3)
        return (best * own.shares[:, :, None]).sum(1), other.narrow(places)

    @staticmethod
    def bytes_of_pair(image: int, text: int, itemsize: int) -> int:
        return 2 * itemsize + image * place_dtype(text).itemsize + text * place_dtype(image).itemsize

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.of_images, self.of_texts, self.text_places, self.image_places

    def toward_images(self, i: _Block, j: _Block, of_images: Tensor, of_texts: Tensor) -> Tensor:
        return self._toward(i, j, of_images, self.text_places, of_texts, self.image_places)

    def toward_texts(self, i: _Block, j: _Block, of_images: Tensor, of_texts: Tensor) -> Tensor:
        return self._toward(j, i, of_texts, self.image_places, of_images, self.text_places)

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


@dataclass(frozen=True, eq=False)
class _Max:
    """BLIP-2's: the largest similarity of any two tokens, the same from either side."""

    of_images: Tensor  # [I, J]
    image_places: Tensor  # [I, J]
    text_places: Tensor  # [I, J]

    @classmethod
    def of(cls, products: Tensor, i: _Block, j: _Block) -> _Max:
        best, text_places = products.view(*i.shape, *j.shape).max(3)
        of_images, image_places = best.transpose(1, 2).contiguous().max(2)
        text_places = text_places.gather(1, image_places[:, None, :])[:, 0]
        return cls(of_images, i.narrow(image_places.T).T, j.narrow(text_places))

    @staticmethod
    def bytes_of_pair(image: int, text: int, itemsize: int) -> int:
        return itemsize + place_dtype(image).itemsize + place_dtype(text).itemsize

    @property
    def of_texts(self) -> Tensor:
        return self.of_images.T

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.of_images, self.image_places, self.text_places

    def toward_images(self, i: _Block, j: _Block, of_images: Tensor, of_texts: Tensor) -> Tensor:
        return self._toward(i, j, of_images + of_texts.T, self.image_places, self.text_places)

    def toward_texts(self, i: _Block, j: _Block, of_images: Tensor, of_texts: Tensor) -> Tensor:
        return self._toward(j, i, of_images.T + of_texts, self.text_places.T, self.image_places.T)

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


def _tiles(similarity: str, scale: Tensor, targets: Targets, gradient: bool) -> Tiles:
    return Tiles(TorchArithmetic(similarity, scale), scale, targets, gradient)


late_interaction_loss = partial(driver.late_interaction_loss, _tiles)
