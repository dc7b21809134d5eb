"""Losses over all pairs of rows of two matrices, in Triton, on the host: tiles, and gradients by waves of weights.

A weight ``G_ij`` is the derivative of a loss by the similarity ``X_i Y_j^t``. A loss writes the weights of one wave of pairs
into a workspace that the next wave takes over; the library's products ``G Y`` and ``G^t X`` make gradients of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core.triton_runtime import family

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A wave of 4,096 x 4,096 bfloat16 weights: an H100's second cache holds it beside the rows that the products read.
WORKSPACE_BYTES = 32 * 2**20
WAVE_ROWS = 4096
WHOLE_TILES = 256  # parts of a matrix are multiples of this, so that no tile of theirs is cut
STRIDE_UNIT = 64  # rows of weights begin on whole cache lines, whatever the number of columns

# float16 ends at 6e-8: weights of large batches are kept away from there, and sums of a row of them far below 65,504.
FACTOR = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1024.0}


class TileSizes(NamedTuple):
    """Rows and columns of a tile, width taken at a time, warps of a program, stages of its software pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def refusal(facts: Mapping[str, Any]) -> str | None:
    """Why Triton kernels cannot serve a loss over pairs of features in ``facts["dtype"]``; ``None`` when they can."""
    if facts["dtype"] not in DTYPES:
        return f"it computes in float32, the inputs are {str(facts['dtype']).removeprefix('torch.')}"
    return None


def tile_sizes(dtype: torch.dtype, width: int, architecture: int) -> TileSizes:
    """What a tile of similarities is computed in on ``architecture`` (90 is sm_90), for rows of ``width`` values."""
    depth = min(64, max(16, 1 << (width - 1).bit_length()))
    if dtype == torch.float32:  # products without tensor cores keep both factors in registers
        return TileSizes(64, 64, min(depth, 32), 8, 2)
    if family(architecture) == 100:
        return TileSizes(64, 128, depth, 4, 3)
    return TileSizes(128, 128, depth, 8, 2 if family(architecture) == 86 else 3)


def rows_of(x: Tensor) -> Tensor:
    """``x`` with neighbouring columns next to each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Wave(NamedTuple):
    """A range of rows and of columns, and where the weights of their pairs go: [rows, columns] of a workspace."""

    rows: slice
    columns: slice
    weights: Tensor

    def programs(self, sizes: TileSizes) -> int:
        """Tiles of the wave, each a program's."""
        height, width = self.weights.shape
        return -(-height // sizes.rows) * -(-width // sizes.columns)


def waves(rows: int, columns: int, like: Tensor) -> Iterator[Wave]:
    """Waves that cover ``rows`` x ``columns``, with weights in the dtype of ``like``, all in one workspace."""
    if rows == 0 or columns == 0:
        return
    height, width = wave_shape(rows, columns, like.element_size())
    workspace = like.new_empty(height, -(-width // STRIDE_UNIT) * STRIDE_UNIT)
    for i in range(0, rows, height):
        for j in range(0, columns, width):
            span, across = slice(i, min(i + height, rows)), slice(j, min(j + width, columns))
            yield Wave(span, across, workspace[: span.stop - i, : across.stop - j])


def wave_shape(rows: int, columns: int, element_size: int) -> tuple[int, int]:
    """Rows and columns of a wave: equal parts of the matrix, as few as the workspace allows."""
    height = _equal_parts(rows, WAVE_ROWS)
    return height, _equal_parts(columns, WORKSPACE_BYTES // (height * element_size))


def _equal_parts(length: int, most: int) -> int:
    """The length of the parts, at most ``most`` long."""
    if length <= most:
        return length
    parts = -(-length // (most // WHOLE_TILES * WHOLE_TILES))
    return -(-length // (parts * WHOLE_TILES)) * WHOLE_TILES


def differentiate(
    weigh: Callable[[Wave], Any], x: Tensor, y: Tensor, toward_x: Tensor | None, toward_y: Tensor | None
) -> None:
    """``toward_x += G y`` and ``toward_y += G^t x`` in float32; either may be ``None``.

    ``weigh(wave)`` writes the weights of a wave, times ``FACTOR[x.dtype]``.
    """
    for wave in waves(len(x), len(y), x):
        weigh(wave)
        if toward_x is not None:
            add_product(toward_x[wave.rows], wave.weights, y[wave.columns])
        if toward_y is not None:
            add_product(toward_y[wave.columns], wave.weights.T, x[wave.rows])


def add_product(total: Tensor, weights: Tensor, features: Tensor) -> None:
    """``total += weights features / FACTOR``: half types multiply as such, sums are float32 all the way."""
    alpha = 1 / FACTOR[features.dtype]
    if features.dtype == torch.float32 or features.device.type == "cpu":
        total.addmm_(weights.to(total.dtype), features.to(total.dtype), alpha=alpha)
    else:
        torch.addmm(total, weights, features, out_dtype=total.dtype, alpha=alpha, out=total)
