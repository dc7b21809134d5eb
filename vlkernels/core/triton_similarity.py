"""A tile of similarities of two matrices, ``X_i Y_j^t``, in Triton: what losses over all pairs of their rows begin with."""

from __future__ import annotations

import triton
import triton.language as tl

RUN = tl.constexpr(16)


@triton.jit
def similarity_tile(
    x_base, y_base, first_row, first_column, rows, columns, x_stride, y_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, COLUMNS]: products of rows ``first_row ..`` of X [rows, WIDTH] and ``first_column ..`` of Y [columns, WIDTH].

    Zero where a row or a column is past the end. float32 multiplies as such; half types take tensor cores.
    """
    depth = tl.arange(0, DEPTH)[None, :]
    x_rows, y_rows = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[:, None]
    row, column = first_row, first_column  # tensors in the interpreter too, where the counter of a loop is an int
    x = x_base + row.to(tl.int64) * x_stride + (x_rows * x_stride + depth)
    y = y_base + column.to(tl.int64) * y_stride + (y_rows * y_stride + depth)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    stop = tl.where(rows > 0, WIDTH, 0)  # WIDTH, unknown to the compiler: unrolled, the loop fills the registers with addresses
    for start in range(0, stop, DEPTH):
        in_x, in_y = x_rows < rows - row, y_rows < columns - column
        if WIDTH % DEPTH != 0:
            in_x, in_y = in_x & (depth < WIDTH - start), in_y & (depth < WIDTH - start)
        x_tile = tl.load(x + start, mask=in_x, other=0.0)
        y_tile = tl.load(y + start, mask=in_y, other=0.0)
        sums = tl.dot(x_tile, tl.trans(y_tile), sums, input_precision="ieee")
    return sums


@triton.jit
def tile_of_wave(program, first_row, first_column, end_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(row, column) where the tile of a program begins, in a wave from (first_row, first_column) to ``end_column``."""
    across = tl.cdiv(end_column - first_column, COLUMNS)
    return first_row + program // across * ROWS, first_column + program % across * COLUMNS


@triton.jit
def store_weights(
    base, stride, weights, row, column, first_row, first_column, end_row, end_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the tile of weights at (row, column) into the workspace of the wave from (first_row, first_column) to the ends."""
    own_rows, own_columns = row - first_row + tl.arange(0, ROWS)[:, None], column - first_column + tl.arange(0, COLUMNS)[None, :]
    place = base + own_rows * stride + own_columns  # a workspace has less than 2^31 weights
    # Whole runs of columns, for which every row of a workspace has room: where no run is cut short, stores are wide.
    there = (own_rows < end_row - first_row) & (own_columns < tl.cdiv(end_column - first_column, RUN) * RUN)
    tl.store(place, weights.to(base.dtype.element_ty), mask=there)
