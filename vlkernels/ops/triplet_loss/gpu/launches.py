"""impl "triton" on the host: what the kernels are launched with, for the pairs of two blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlkernels.core import similarity
from vlkernels.core.exchange import Block
from vlkernels.core.similarity import TileSizes, Wave
from vlkernels.core.triton_runtime import Launch

Pair = tuple[Tensor, Tensor]

# Tiles of rows that the programs of the maxima go down together: 16 by 16 tiles of 1,024 values are 8 MB of a card's second cache.
BAND = 16
# A program of the gather adds so many features of a row at a time, so many columns of them.
TAKEN, COLUMNS, WARPS = 8, 256, 4


def hardest_launch(images: Block, texts: Block, labels: Tensor | None, ranks: Pair, architecture: int) -> Launch:
    """``ranks``: int64, of the hardest negatives of the images and of the texts so far; ``labels``: of all ranks."""
    sizes = tile_sizes(images, architecture)
    rows, columns = len(images.features), len(texts.features)
    arguments = (
        images.features, texts.features, *_labels(images, texts, labels), *ranks, rows, columns, images.start - texts.start,
        images.start, texts.start, images.features.stride(0), texts.features.stride(0),
    )  # fmt: skip
    grid = (-(-rows // sizes.rows) * -(-columns // sizes.columns),)
    constants = {**_constants(images, sizes), "BAND": BAND}
    return Launch(_kernels().hardest_kernel, grid, arguments, constants, sizes.warps, sizes.stages)


def exceeding_launch(
    images: Block, texts: Block, labels: Tensor | None, least: Tensor, wave: Wave, pushes: Pair, sums: Tensor, gradient: bool,
    architecture: int,
) -> Launch:  # fmt: skip
    """``least``: of all ranks; ``pushes``: int32, of the images and of the texts; ``sums``: float32 [programs of the wave]."""
    sizes = tile_sizes(images, architecture)
    arguments = (
        images.features, texts.features, *_labels(images, texts, labels), least[images.span], least[texts.span], wave.weights,
        *pushes, sums, wave.rows.start, wave.columns.start, wave.rows.stop, wave.columns.stop, images.start - texts.start,
        images.features.stride(0), texts.features.stride(0), wave.weights.stride(0), similarity.FACTOR[images.features.dtype],
    )  # fmt: skip
    constants = {**_constants(images, sizes), "GRADIENT": gradient}
    return Launch(_kernels().exceeding_kernel, (wave.programs(sizes),), arguments, constants, sizes.warps, sizes.stages)


def gather_launch(toward: Tensor, features: Tensor, places: Tensor, order: Tensor, bounds: Tensor) -> Launch:
    """``places``, one of each row of ``toward``, are -1 for none; see the kernel for ``order`` and ``bounds``."""
    rows, width = toward.shape
    arguments = (features, places, order, bounds, toward, features.stride(0), toward.stride(0))
    constants = {"TAKEN": TAKEN, "COLUMNS": COLUMNS, "WIDTH": width}
    return Launch(_kernels().gather_kernel, (rows, -(-width // COLUMNS)), arguments, constants, WARPS, 1)


def tile_sizes(images: Block, architecture: int) -> TileSizes:
    return similarity.tile_sizes(images.features.dtype, images.features.shape[1], architecture)


def _constants(images: Block, sizes: TileSizes) -> dict[str, Any]:
    return {"ROWS": sizes.rows, "COLUMNS": sizes.columns, "DEPTH": sizes.depth, "WIDTH": images.features.shape[1]}


def _labels(images: Block, texts: Block, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if labels is None else (labels[images.span], labels[texts.span])


def _kernels() -> Any:
    from vlkernels.ops.triplet_loss.gpu import kernels

    return kernels
