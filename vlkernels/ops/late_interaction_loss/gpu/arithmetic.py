"""impl "triton": the arithmetic of two blocks of samples by launches of the kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from vlkernels.core import triton_runtime
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.late_interaction_loss import driver
from vlkernels.ops.late_interaction_loss.driver import Samples, Targets
from vlkernels.ops.late_interaction_loss.gpu.launches import Block, Maxima, empty_maxima, gradient_launch, maxima_launches
from vlkernels.ops.late_interaction_loss.tiles import Tiles, place_dtype

TILE_BYTES = 2**26  # of the maxima and places of two blocks


@dataclass(frozen=True, eq=False)
class Tile:
    """The maxima of two blocks, the images being the rows."""

    maxima: Maxima

    @property
    def of_images(self) -> Tensor:
        return self.maxima.of_rows

    @property
    def of_texts(self) -> Tensor:
        return self.maxima.of_columns

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.maxima


class TritonArithmetic:
    """Blocks as large as a tile's memory allows; lengths stay on the device."""

    def __init__(self, similarity: str, scale: Tensor):
        self._any_two = similarity == "max"
        self._architecture = triton_runtime.architecture(scale.device)

    def blocks(self, images: Samples, texts: Samples) -> Iterator[tuple[Block, Block]]:
        size = max(1, math.isqrt(TILE_BYTES // self.bytes_of_pair(images, texts)))
        return product(*(_cut(side, size) for side in (images, texts)))

    def bytes_of_pair(self, images: Samples, texts: Samples) -> int:
        of_image, of_text = place_dtype(images.longest).itemsize, place_dtype(texts.longest).itemsize
        return 8 + (of_image + of_text if self._any_two else images.longest * of_text + texts.longest * of_image)

    def reduce(self, i: Block, j: Block) -> Tile:
        maxima = empty_maxima(i, j, self._any_two)
        for launch in maxima_launches(i, j, maxima, self._any_two, self._architecture):
            _run(launch, i)
        return Tile(maxima)

    def restore(self, parts: Sequence[Tensor]) -> Tile:
        return Tile(Maxima(*parts))

    def toward_images(self, tile: Tile, i: Block, j: Block, by_images: Tensor, by_texts: Tensor, gradient: Tensor) -> None:
        _, _, *places = tile.maxima
        weights = (by_images + by_texts.T, None) if self._any_two else (by_images, by_texts)
        _run(gradient_launch(gradient, i, j, *weights, *places, self._architecture), i)

    def toward_texts(self, tile: Tile, i: Block, j: Block, by_images: Tensor, by_texts: Tensor, gradient: Tensor) -> None:
        _, _, of_images, of_texts = tile.maxima
        if self._any_two:
            weights, *places = (pairs.T.contiguous() for pairs in (by_images + by_texts.T, of_texts, of_images))
            _run(gradient_launch(gradient, j, i, weights, None, *places, self._architecture), j)
        else:
            _run(gradient_launch(gradient, j, i, by_texts, by_images, of_texts, of_images, self._architecture), j)


def _cut(samples: Samples, size: int) -> Iterator[Block]:
    for first in range(0, len(samples.starts), size):
        yield _block(samples, slice(first, min(first + size, len(samples.starts))))


def _block(samples: Samples, span: slice) -> Block:
    starts, lengths = (bounds[span].to(torch.int32).contiguous() for bounds in (samples.starts, samples.lengths))
    number = samples.start + span.start
    return Block(
        tokens=samples.tokens,
        starts=starts,
        lengths=lengths,
        offsets=lengths.cumsum(0, dtype=torch.int32) - lengths,
        longest=samples.longest,
        count=min(len(starts) * samples.longest, len(samples.tokens)),
        samples=torch.arange(number, number + len(starts), device=starts.device),
        place=number,
    )


def _run(launch: Launch, block: Block) -> None:
    with torch.cuda.device_of(block.tokens):
        launch.run()


def _tiles(similarity: str, scale: Tensor, targets: Targets, gradient: bool) -> Tiles:
    return Tiles(TritonArithmetic(similarity, scale), scale, targets, gradient)


late_interaction_loss = partial(driver.late_interaction_loss, _tiles)
