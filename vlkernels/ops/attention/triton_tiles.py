"""Device functions that the Triton kernels of attention share: rows in and out, statistics of rows, products of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, first, stride, end, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr):
    """Rows ``first ..`` of one head, zero past ``HEAD_DIM`` and, where ``CHECKED``, from row ``end`` on."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    start = first  # a tensor in the interpreter too, where the counter of a loop is an int
    pointers = base + start.to(tl.int64) * stride + (row * stride + column)
    if CHECKED:
        inside = row < end - first
        if HEAD_DIM < WIDTH:
            inside = inside & (column < HEAD_DIM)
        return tl.load(pointers, mask=inside, other=0.0)
    if HEAD_DIM < WIDTH:
        return tl.load(pointers, mask=column < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, values, first, stride, begin, stop, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store rows [begin, stop) of a tile that starts at ``first``."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (row >= begin - first) & (row < stop - first)
    if HEAD_DIM < WIDTH:
        inside = inside & (column < HEAD_DIM)
    pointers = base + first.to(tl.int64) * stride + (row * stride + column)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_statistics(base, rows, end, default):
    return tl.load(base + rows, mask=rows < end, other=default)


@triton.jit
def scores(q, k):
    return tl.dot(q, tl.trans(k), input_precision="ieee")
