"""Tiles of two blocks of samples, visited twice: first for the statistics, then for the gradients.

What a tile is made of, and how, is an :class:`Arithmetic`. What the second visit needs waits in one piece of memory: tensors of
their own would leave holes between the temporaries of the first. What does not fit there is made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vlkernels.ops.late_interaction_loss.driver import Samples, Statistics, Targets

KEPT_BYTES = 2**28  # of maxima and their places that wait from the first visit for the second
ALIGNMENT = 16


def place_dtype(longest: int) -> torch.dtype:
    """What holds the place of a token in as few bytes as possible."""
    return torch.uint8 if longest <= 2**8 else torch.int16 if longest <= 2**15 else torch.int32


class Block(Protocol):
    """Some samples of one side."""

    samples: Tensor  # [b], their numbers in the batch of all ranks
    place: int  # no other block of its side has it


class Tile(Protocol):
    """The similarities of images ``[I, J]`` and of texts ``[J, I]`` of two blocks, and what their gradients need."""

    of_images: Tensor
    of_texts: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All that it holds; :meth:`Arithmetic.restore` makes it again from these."""


class Arithmetic(Protocol):
    """What a device computes for two blocks."""

    def blocks(self, images: Samples, texts: Samples) -> Iterator[tuple[Any, Any]]: ...

    def bytes_of_pair(self, images: Samples, texts: Samples) -> int:
        """The most that a tile takes for each of its pairs of samples."""

    def reduce(self, i: Any, j: Any) -> Tile: ...

    def restore(self, parts: Sequence[Tensor]) -> Tile: ...

    def toward_images(self, tile: Any, i: Any, j: Any, by_images: Tensor, by_texts: Tensor, gradient: Tensor) -> None:
        """Add what weights ``[I, J]`` and ``[J, I]`` of the similarities give the tokens of the images."""

    def toward_texts(self, tile: Any, i: Any, j: Any, by_images: Tensor, by_texts: Tensor, gradient: Tensor) -> None: ...


class Tiles:
    """The :class:`driver.Tiles` of some arithmetic."""

    def __init__(self, arithmetic: Arithmetic, scale: Tensor, targets: Targets, gradient: bool):
        self._arithmetic, self._scale, self._targets = arithmetic, scale, targets
        self._room = KEPT_BYTES if gradient else 0
        self._kept: dict[tuple[int, int], Tile] = {}
        self._memory = torch.empty(0, dtype=torch.uint8, device=scale.device)

    def statistics(self, images: Samples, texts: Samples, of_images: Statistics, of_texts: Statistics) -> None:
        self._reserve(images, texts)
        for i, j in self._arithmetic.blocks(images, texts):
            tile = self._keep(i, j, self._arithmetic.reduce(i, j))
            of_images.add(i.samples, self._scale * tile.of_images, self._targets.between(i.samples, j.samples, self._scale))
            of_texts.add(j.samples, self._scale * tile.of_texts, self._targets.between(j.samples, i.samples, self._scale))

    def differentiate(
        self,
        images: Samples,
        texts: Samples,
        of_images: Statistics,
        of_texts: Statistics,
        toward_images: Tensor | None,
        toward_texts: Tensor | None,
    ) -> None:
        for i, j in self._arithmetic.blocks(images, texts):
            tile = self._kept.get((i.place, j.place)) or self._arithmetic.reduce(i, j)
            by_images = of_images.softmax(i.samples, self._scale * tile.of_images)
            by_images -= self._targets.between(i.samples, j.samples, self._scale)
            by_texts = of_texts.softmax(j.samples, self._scale * tile.of_texts)
            by_texts -= self._targets.between(j.samples, i.samples, self._scale)
            if toward_images is not None:
                self._arithmetic.toward_images(tile, i, j, by_images, by_texts, toward_images)
            if toward_texts is not None:
                self._arithmetic.toward_texts(tile, i, j, by_images, by_texts, toward_texts)

    def _reserve(self, images: Samples, texts: Samples) -> None:
        """Memory for the tiles of these samples, as much as there is room for; pages that none is written to cost nothing."""
        wanted = len(images.starts) * len(texts.starts) * self._arithmetic.bytes_of_pair(images, texts)
        self._memory = self._memory.new_empty(min(wanted, self._room))

    def _keep(self, i: Block, j: Block, tile: Tile) -> Tile:
        sizes = [-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in tile.parts]
        if sum(sizes) > len(self._memory):
            return tile
        taken, self._memory = self._memory[: sum(sizes)], self._memory[sum(sizes) :]
        self._room -= sum(sizes)
        parts = []
        for memory, part in zip(taken.split(sizes), tile.parts):
            parts.append(memory[: part.nbytes].view(part.dtype).view(part.shape).copy_(part))
        kept = self._kept[i.place, j.place] = self._arithmetic.restore(parts)
        return kept
