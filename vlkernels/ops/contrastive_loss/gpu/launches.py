"""impl "triton" of the contrastive loss on the host: the launches, pure functions of a call and the architecture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlkernels.core import similarity
from vlkernels.core.similarity import TileSizes, Wave
from vlkernels.core.triton_runtime import Launch, family

FIELDS = 4  # of the statistics of a row or a column
# Splits of rows and strips of columns: so many programs keep the multiprocessors of a large card busy, and so few parts of the
# statistics are there to join.
MOST_SPLITS, PROGRAMS = 16, 256
TARGET_TILE = TileSizes(32, 128, 0, 4, 1)
# A contracted product and difference would not find the largest logit of a row equal to itself.
EXACT = {"enable_fp_fusion": False}


def tile_sizes(x: Tensor, by_column: bool, labels: bool, statistics: bool, architecture: int) -> TileSizes:
    """Narrower tiles where labels of both sides, or statistics of both on sm_100, would not leave the registers room."""
    sizes = similarity.tile_sizes(x.dtype, x.shape[1], architecture)
    narrow = statistics and family(architecture) == 100
    if x.dtype == torch.float32 or not by_column or not (labels or narrow):
        return sizes
    return sizes._replace(rows=64, columns=64, warps=4) if labels and narrow else sizes._replace(rows=128, columns=64, warps=8)


def statistics_launch(
    x: Tensor, y: Tensor, scale: Tensor, labels: tuple[Tensor, Tensor] | None, partner: int, by_column: bool, architecture: int,
) -> tuple[Launch, Tensor, Tensor | None]:  # fmt: skip
    """The launch, and what it writes: parts [parts, FIELDS, rows] of the statistics of rows, and the same of columns."""
    (rows, width), columns = x.shape, len(y)
    sizes = tile_sizes(x, by_column, labels is not None, True, architecture)
    down, splits = _share(-(-rows // sizes.rows), MOST_SPLITS)
    across, strips = _share(-(-columns // sizes.columns), max(MOST_SPLITS, PROGRAMS // splits))
    row_parts = scale.new_empty(strips, FIELDS, rows)
    column_parts = scale.new_empty(splits, FIELDS, columns) if by_column else None
    row_labels, column_labels = labels or (None, None)
    arguments = (
        x, y, scale, row_labels, column_labels, row_parts, column_parts, x.stride(0), y.stride(0), rows, columns, partner, down,
        across, strips,
    )  # fmt: skip
    flags = {"LABELS": labels is not None, "BY_COLUMN": by_column}
    launch = _launch(_kernels().statistics_kernel, splits * strips, arguments, sizes, WIDTH=width, **flags)
    return launch, row_parts, column_parts


def weights_launch(
    x: Tensor, y: Tensor, scale: Tensor, of_rows: tuple[Tensor, Tensor | None], of_columns: tuple[Tensor, Tensor] | None,
    labels: tuple[Tensor, Tensor, Tensor] | None, partner: int, hard: float, wave: Wave, alignments: Tensor | None,
    architecture: int,
) -> Launch:  # fmt: skip
    """``of_rows`` and ``of_columns``: largest logits and what exponentials are multiplied by. Labels: those of both, and the
    shares of columns. ``alignments``: a place for each program."""
    sizes = tile_sizes(x, of_columns is not None, labels is not None, False, architecture)
    row_labels, column_labels, shares = labels or (None, None, None)
    arguments = (
        x, y, scale, *of_rows, *(of_columns or (None, None)), row_labels, column_labels, shares, wave.weights, alignments,
        x.stride(0), y.stride(0), wave.weights.stride(0), len(x), len(y), partner, *_corners(wave), hard,
        similarity.FACTOR[x.dtype],
    )  # fmt: skip
    flags = {"LABELS": labels is not None, "BY_COLUMN": of_columns is not None}
    return _launch(_kernels().weights_kernel, wave.programs(sizes), arguments, sizes, WIDTH=x.shape[1], **flags)


def programs_of_a_wave(x: Tensor, y: Tensor, labels: bool, architecture: int) -> int:
    """The most programs that weigh a wave of a gradient of both sides."""
    height, width = similarity.wave_shape(len(x), len(y), x.element_size())
    sizes = tile_sizes(x, True, labels, False, architecture)
    return -(-height // sizes.rows) * -(-width // sizes.columns)


def targets_launch(row_labels: Tensor, column_labels: Tensor, shares: Tensor, wave: Wave) -> Launch:
    sizes = TARGET_TILE
    arguments = (
        row_labels, column_labels, shares, wave.weights, wave.weights.stride(0), len(row_labels), len(column_labels),
        *_corners(wave), similarity.FACTOR[wave.weights.dtype],
    )  # fmt: skip
    constants = {"ROWS": sizes.rows, "COLUMNS": sizes.columns}
    return Launch(_kernels().targets_kernel, (wave.programs(sizes),), arguments, constants, sizes.warps, sizes.stages)


def _share(tiles: int, most: int) -> tuple[int, int]:
    """Tiles of a part, and how many parts there are, at most ``most``."""
    each = -(-tiles // most)
    return each, -(-tiles // each)


def _corners(wave: Wave) -> tuple[int, int, int, int]:
    return wave.rows.start, wave.columns.start, wave.rows.stop, wave.columns.stop


def _launch(kernel: Any, programs: int, arguments: tuple[Any, ...], sizes: TileSizes, **constants: Any) -> Launch:
    tile = {"ROWS": sizes.rows, "COLUMNS": sizes.columns, "DEPTH": sizes.depth}
    return Launch(kernel, (programs,), arguments, {**tile, **constants, **EXACT}, sizes.warps, sizes.stages)


def _kernels() -> Any:
    from vlkernels.ops.contrastive_loss.gpu import kernels

    return kernels
