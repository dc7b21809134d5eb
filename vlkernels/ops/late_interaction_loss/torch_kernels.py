"""The late-interaction loss over tiles of token similarities: both maxima from one visit of each tile.

No ``[N, N]`` of samples and no ``[N, N, P, T]`` of tokens is ever stored, and gradients come with the value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops.late_interaction_loss import driver
from vlkernels.ops.late_interaction_loss.driver import Samples, Statistics, Targets

TILE = 1024  # tokens, padding included, of each side
KEPT_BYTES = 2**28  # of maxima and their places that wait from the first visit for the second


class Tiles:
    """Tiles of token similarities, reduced to their maxima; the first KEPT_BYTES of these stay, others are made anew."""

    def __init__(self, similarity: str, scale: Tensor, targets: Targets, gradient: bool):
        self._reduce = SIMILARITIES[similarity]
        self._scale, self._targets = scale, targets
        self._room = KEPT_BYTES if gradient else 0
        self._kept: dict[tuple[int, int], _MeanMax | _Max] = {}
        self._workspace = scale.new_empty(0)

    def statistics(self, images: Samples, texts: Samples, of_images: Statistics, of_texts: Statistics) -> None:
        for i, j in self._blocks(images, texts):
            tile = self._tile(i, j)
            _take(of_images, i.samples, self._scale * tile.of_images, self._wanted(i, j))
            _take(of_texts, j.samples, self._scale * tile.of_texts, self._wanted(j, i))

    def differentiate(
        self,
        images: Samples,
        texts: Samples,
        of_images: Statistics,
        of_texts: Statistics,
        toward_images: Tensor | None,
        toward_texts: Tensor | None,
    ) -> None:
        for i, j in self._blocks(images, texts):
            tile = self._tile(i, j)
            by_images = _softmax(of_images, i.samples, self._scale * tile.of_images) - self._wanted(i, j)
            by_texts = _softmax(of_texts, j.samples, self._scale * tile.of_texts) - self._wanted(j, i)
            if toward_images is not None:
                i.add(tile.toward_images(i, j, by_images, by_texts), toward_images)
            if toward_texts is not None:
                j.add(tile.toward_texts(i, j, by_images, by_texts), toward_texts)

    def _blocks(self, images: Samples, texts: Samples) -> Iterator[tuple[_Block, _Block]]:
        return product(*(_cut(side, self._scale.dtype) for side in (images, texts)))

    def _tile(self, i: _Block, j: _Block) -> _MeanMax | _Max:
        if (i.place, j.place) in self._kept:
            return self._kept[i.place, j.place]
        products = self._memory(len(i.tokens), len(j.tokens))
        torch.mm(i.tokens, j.tokens.T, out=products)
        reduced = self._reduce(products, i, j)
        if reduced.num_bytes <= self._room:
            self._room -= reduced.num_bytes
            self._kept[i.place, j.place] = reduced
        return reduced

    def _memory(self, rows: int, columns: int) -> Tensor:
        if rows * columns > len(self._workspace):
            self._workspace = self._workspace.new_empty(rows * columns)
        return self._workspace[: rows * columns].view(rows, columns)

    def _wanted(self, queries: _Block, keys: _Block) -> Tensor:
        """The targets of some samples, one on the own partner, smoothed over the batch."""
        smoothing = self._targets.label_smoothing
        partners = (queries.samples[:, None] == keys.samples).to(queries.tokens.dtype)
        return partners.mul_(1 - smoothing).add_(smoothing / self._targets.total)


def _take(statistics: Statistics, samples: Tensor, logits: Tensor, targets: Tensor) -> None:
    largest = torch.maximum(statistics.largest[samples], logits.amax(1))
    shrunk = statistics.total[samples] * (statistics.largest[samples] - largest).exp_()
    statistics.largest[samples] = largest
    statistics.total[samples] = shrunk + (logits - largest[:, None]).exp_().sum(1)
    statistics.wanted[samples] += (logits * targets).sum(1)


def _softmax(statistics: Statistics, samples: Tensor, logits: Tensor) -> Tensor:
    return (logits - statistics.largest[samples, None]).exp_() / statistics.total[samples, None]



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
        longest = self.shape[1]
        dtype = torch.uint8 if longest <= 2**8 else torch.int16 if longest <= 2**15 else torch.int32
        return torch.minimum(places, self.lengths - 1).to(dtype)

    def add(self, toward: Tensor, gradient: Tensor | None) -> None:
        """Add to the rows; those of the padding are zero, so every row has one term and any order will do."""
        if gradient is not None:
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


late_interaction_loss = partial(driver.late_interaction_loss, Tiles)
