"""Device functions that the Triton kernels of attention share: rows in and out, statistics, scores and their bias."""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import triton_math

NOTHING = tl.constexpr(-float("inf"))


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
def load_lse(base, rows, end):
    """lse in powers of two; +inf, which gives probability 0, for rows that see nothing and from row ``end`` on."""
    lse = load_statistics(base, rows, end, NOTHING)
    return tl.where(lse == NOTHING, float("inf"), lse * triton_math.LOG2_E)


@triton.jit
def scores(q, k):
    return tl.dot(q, tl.trans(k), input_precision="ieee")


# The bias of a call is (base, samples, sample_stride, head_stride, row_stride, radius), and its kind ``BIAS`` is None, "tensor"
# (a plane [Lq, Lk] for every sample and head; ``samples`` names the sample of a row) or "relative" (a table [COORDINATES,
# 2 radius + 1] for every head).


@triton.jit
def load_coordinates(base, rows, end, COORDINATES: tl.constexpr):
    """A tuple of the coordinates of ``rows``, each of their shape; 0 from row ``end`` on."""
    found = ()
    for c in tl.static_range(COORDINATES):
        found = found + (tl.load(base + rows.to(tl.int64) * COORDINATES + c, mask=rows < end, other=0),)
    return found


@triton.jit
def open_bias(bias, head, row, origin, end, own, others, BIAS: tl.constexpr):
    """What a tile keeps of the bias of a head. ``row``: a query of the sample; its own rows are of the sample [origin, end).

    ``own``: the coordinates of the tile's rows; ``others``: where those of the other stream lie.
    """
    base, samples, sample_stride, head_stride, row_stride, radius = bias
    if BIAS == "tensor":
        sample = tl.load(samples + row).to(tl.int64)
        opened = base + sample * sample_stride + head * head_stride, row_stride, origin, end
    elif BIAS == "relative":
        opened = base + head * head_stride, radius, own, others
    else:
        opened = ()
    return opened


@triton.jit
def biased(
    products, scale, bias, rows, others, origin, end, BIAS: tl.constexpr, COORDINATES: tl.constexpr, BY_KEY: tl.constexpr
):  # fmt: skip
    """``scale products + bias`` of the tile's own ``rows`` [R, 1] and ``others`` [1, N] of the sample [origin, end).

    ``bias`` is what :func:`open_bias` kept; the rows are queries, or keys with ``BY_KEY``.
    """
    if BIAS == "tensor":
        plane, row_stride, own_origin, own_end = bias
        if BY_KEY:
            added = planar_bias(plane, row_stride, others, origin, end, rows, own_origin, own_end)
        else:
            added = planar_bias(plane, row_stride, rows, own_origin, own_end, others, origin, end)
    else:
        table, radius, own, where = bias
        found = load_coordinates(where, others, end, COORDINATES)
        if BY_KEY:
            added = relative_bias(table, radius, found, own, COORDINATES)
        else:
            added = relative_bias(table, radius, own, found, COORDINATES)
    return products * scale + added


@triton.jit
def planar_bias(plane, row_stride, queries, query_origin, query_end, keys, key_origin, key_end):
    """Entries of a sample's plane, float32; rows and columns past the ends read the last ones."""
    rows = tl.minimum(queries, query_end - 1) - query_origin
    columns = tl.minimum(keys, key_end - 1) - key_origin
    return tl.load(plane + rows.to(tl.int64) * row_stride + columns).to(tl.float32)


@triton.jit
def store_plane(bias, values, queries, keys, begin, origin, end):
    """Store the entries of queries and keys that belong to a run of keys [begin, end) in a sample's plane."""
    plane, row_stride, query_origin, query_end = bias
    pointers = plane + (queries - query_origin).to(tl.int64) * row_stride + (keys - origin)
    tl.store(pointers, values.to(plane.dtype.element_ty), mask=(queries < query_end) & (keys >= begin) & (keys < end))


@triton.jit
def relative_bias(table, radius, of_queries, of_keys, COORDINATES: tl.constexpr):
    """The sum over coordinates of the table's value at the distance of key and query."""
    total = tl.load(table + radius + clamped_distance(of_queries[0], of_keys[0], radius))
    for c in tl.static_range(1, COORDINATES):
        row = table + c * (2 * radius + 1)
        total += tl.load(row + radius + clamped_distance(of_queries[c], of_keys[c], radius))
    return total


@triton.jit
def clamped_distance(of_query, of_key, radius):
    return tl.minimum(tl.maximum(of_key - of_query, -radius), radius)
