"""impl "triton" on the device: one program for a tile of the work list and a head; see MATH.md for the loops and their tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import triton_math
from vlkernels.core.random import COLUMNS_PER_CALL
from vlkernels.ops.attention.gpu.tile_functions import (
    NOTHING, biased, load_coordinates, load_lse, load_rows, load_statistics, open_bias, scores, store_plane, store_rows,
)  # fmt: skip
from vlkernels.ops.attention.gpu.work_list import RUN_FIELDS, TILE_FIELDS

TILE_WIDTH, RUN_WIDTH = tl.constexpr(len(TILE_FIELDS)), tl.constexpr(len(RUN_FIELDS))
DRAWN_TOGETHER = tl.constexpr(COLUMNS_PER_CALL)

# Numbers that differ between calls of one model: specialising on them would compile a variant for each.
UNSPECIALIZED = ("statistic_stride", "stream", "threshold", "bias_sample", "bias_head", "bias_row", "radius")
UNSPECIALIZED_GRADIENT = (*UNSPECIALIZED, "dbias_sample", "dbias_head", "dbias_row")
# May be part of a larger tensor, at any place of it. Their reads are not made of 16 bytes anyway.
UNALIGNED = ("bias_base", "coordinates", "kv_coordinates")


@triton.jit
def key_range(fields, first, last, KEYS: tl.constexpr, DROPOUT: tl.constexpr):
    """Where queries ``first .. last`` meet the keys of a run: (start, end of what needs no mask, end of all, the run)."""
    begin, end, fixed, slope = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    origin = tl.load(fields + 4)
    start = begin
    if DROPOUT:  # tiles of keys hold whole draws
        start = origin + (begin - origin) // DRAWN_TOGETHER * DRAWN_TOGETHER
    all_see = tl.minimum(end, tl.maximum(fixed, first + slope + 1))
    some_see = tl.minimum(end, tl.maximum(fixed, last + slope + 1))
    unmasked = start + tl.maximum(all_see - start, 0) // KEYS * KEYS
    if DROPOUT:
        unmasked = tl.where(start < begin, start, unmasked)
    return start, unmasked, tl.where(begin < end, some_see, start), (begin, end, fixed, slope, origin)


@triton.jit
def visible(keys, queries, run):
    """bool over the broadcast: the run shows the key to the query."""
    begin, end, fixed, slope, _ = run
    limit = tl.minimum(end - 1, tl.maximum(fixed - 1, queries + slope))
    return (keys >= begin) & (keys <= limit)


@triton.jit
def _see_keys(
    acc, highest, total, q, k_base, v_base, k_stride, v_stride, start, stop, queries, run, scale, softmax_scale, bias, draw,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    BIAS: tl.constexpr, COORDINATES: tl.constexpr,
):  # fmt: skip
    """The online softmax of a tile of queries over the keys ``start ..`` before ``stop``, a tile at a time."""
    end, origin = run[1], run[4]
    key0, key1, stream, head, identity, position, threshold = draw
    for first in range(start, stop, KEYS):
        k = load_rows(k_base, first, k_stride, end, KEYS, HEAD_DIM, WIDTH, MASKED)
        s = scores(q, k)
        keys = first + tl.arange(0, KEYS)
        if BIAS is not None:
            s = biased(s, softmax_scale, bias, queries[:, None], keys[None, :], origin, end, BIAS, COORDINATES, False)
        if MASKED:
            s = tl.where(visible(keys[None, :], queries[:, None], run), s, NOTHING)
        p, factor, highest, total = triton_math.online_softmax(s, highest, total, scale, MASKED or BIAS is not None)
        if DROPOUT:
            kept = triton_math.keep_block(key0, key1, stream, head, identity, position, first - origin, threshold, KEYS, False)
            p = tl.where(kept, p, 0.0)
        v = load_rows(v_base, first, v_stride, end, KEYS, HEAD_DIM, WIDTH, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
    return acc, highest, total


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    q_base, k_base, v_base, out_base, lse_base, tiles, runs, rng_state, bias_base, samples, coordinates, kv_coordinates,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head, statistic_stride, heads_per_key,
    bias_sample, bias_head, bias_row, radius, scale, softmax_scale, stream, threshold, keep_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
    BIAS: tl.constexpr, COORDINATES: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of queries and a head."""
    tile = tiles + tl.program_id(0) * TILE_WIDTH
    head = tl.program_id(1).to(tl.int64)
    first, end, stop = tl.load(tile), tl.load(tile + 2), tl.load(tile + 3)
    if first >= stop:
        return
    queries = first + tl.arange(0, QUERIES)
    origin, identity = tl.load(tile + 6), tl.load(tile + 7)
    key0, key1 = 0, 0
    if DROPOUT:
        key0, key1 = triton_math.draw_key(rng_state)
    draw = key0, key1, stream, head, identity, queries - origin, threshold
    bias = bias_base, samples, bias_sample, bias_head, bias_row, radius
    own = load_coordinates(coordinates, queries[:, None], end, COORDINATES)
    bias = open_bias(bias, head, first, origin, end, own, kv_coordinates, BIAS)
    q = load_rows(q_base + head * q_head, first, q_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
    k_base += head // heads_per_key * k_head
    v_base += head // heads_per_key * v_head
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    highest = tl.full([QUERIES], NOTHING, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    last = tl.minimum(first + QUERIES, end) - 1
    for number in range(tl.load(tile + 4), tl.where(first < end, tl.load(tile + 5), 0)):
        start, unmasked, past, run = key_range(runs + number * RUN_WIDTH, first, last, KEYS, DROPOUT)
        acc, highest, total = _see_keys(
            acc, highest, total, q, k_base, v_base, k_stride, v_stride, start, unmasked, queries, run, scale, softmax_scale,
            bias, draw, KEYS, HEAD_DIM, WIDTH, False, DROPOUT, BIAS, COORDINATES,
        )  # fmt: skip
        acc, highest, total = _see_keys(
            acc, highest, total, q, k_base, v_base, k_stride, v_stride, unmasked, past, queries, run, scale, softmax_scale,
            bias, draw, KEYS, HEAD_DIM, WIDTH, True, DROPOUT, BIAS, COORDINATES,
        )  # fmt: skip
    blind = (total == 0.0) | (queries >= end)
    share = tl.where(blind, 0.0, keep_scale / tl.where(blind, 1.0, total))
    lse = tl.where(blind, NOTHING, (highest + tl.log2(tl.where(blind, 1.0, total))) * triton_math.LN_2)
    tl.store(lse_base + head * statistic_stride + queries, lse, mask=queries < stop)
    acc = tl.where(blind[:, None], 0.0, acc * share[:, None])
    store_rows(out_base + head * out_head, acc, first, out_stride, first, stop, QUERIES, HEAD_DIM, WIDTH)


@triton.jit
def _differentiate_scores(
    dq, q, do, lse, delta, k_base, v_base, k_stride, v_stride, start, stop, queries, run, scale, softmax_scale, bias, dbias, draw,
    keep_scale,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    BIAS: tl.constexpr, COORDINATES: tl.constexpr, GRAD_BIAS: tl.constexpr,
):  # fmt: skip
    """Add ds k to dq for the keys ``start ..`` before ``stop``; store ds where ``GRAD_BIAS``."""
    begin, end, origin = run[0], run[1], run[4]
    key0, key1, stream, head, identity, position, threshold = draw
    for first in range(start, stop, KEYS):
        k = load_rows(k_base, first, k_stride, end, KEYS, HEAD_DIM, WIDTH, MASKED)
        v = load_rows(v_base, first, v_stride, end, KEYS, HEAD_DIM, WIDTH, MASKED)
        s = scores(q, k)
        keys = first + tl.arange(0, KEYS)
        if BIAS is not None:
            s = biased(s, softmax_scale, bias, queries[:, None], keys[None, :], origin, end, BIAS, COORDINATES, False)
        p = tl.exp2(s * scale - lse[:, None])
        if MASKED:
            p = tl.where(visible(keys[None, :], queries[:, None], run), p, 0.0)
        dp = scores(do, v)
        if DROPOUT:
            kept = triton_math.keep_block(key0, key1, stream, head, identity, position, first - origin, threshold, KEYS, False)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if GRAD_BIAS:
            store_plane(dbias, ds, queries[:, None], keys[None, :], begin, origin, end)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED_GRADIENT, do_not_specialize_on_alignment=UNALIGNED)
def query_gradient_kernel(
    q_base, k_base, v_base, out_base, do_base, lse_base, grad_lse_base, delta_base, dq_base, tiles, runs, rng_state,
    bias_base, samples, coordinates, kv_coordinates, dbias_base,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head, do_stride, do_head, dq_stride, dq_head,
    statistic_stride, heads_per_key, bias_sample, bias_head, bias_row, radius, dbias_sample, dbias_head, dbias_row,
    scale, softmax_scale, stream, threshold, keep_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
    BIAS: tl.constexpr, COORDINATES: tl.constexpr, GRAD_LSE: tl.constexpr, GRAD_BIAS: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries and a head; leaves delta for the kernels that follow, and the gradient of a bias nobody shares."""
    tile = tiles + tl.program_id(0) * TILE_WIDTH
    head = tl.program_id(1).to(tl.int64)
    first, end, stop = tl.load(tile), tl.load(tile + 2), tl.load(tile + 3)
    if first >= stop:
        return
    queries = first + tl.arange(0, QUERIES)
    origin, identity = tl.load(tile + 6), tl.load(tile + 7)
    key0, key1 = 0, 0
    if DROPOUT:
        key0, key1 = triton_math.draw_key(rng_state)
    draw = key0, key1, stream, head, identity, queries - origin, threshold
    own = load_coordinates(coordinates, queries[:, None], end, COORDINATES)
    bias = bias_base, samples, bias_sample, bias_head, bias_row, radius
    bias = open_bias(bias, head, first, origin, end, own, kv_coordinates, BIAS)
    dbias = ()
    if GRAD_BIAS:
        dbias = dbias_base, samples, dbias_sample, dbias_head, dbias_row, 0
        dbias = open_bias(dbias, head, first, origin, end, own, kv_coordinates, BIAS)
    q = load_rows(q_base + head * q_head, first, q_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
    do = load_rows(do_base + head * do_head, first, do_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
    out = load_rows(out_base + head * out_head, first, out_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
    statistics = head * statistic_stride
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if GRAD_LSE:
        delta -= load_statistics(grad_lse_base + statistics, queries, end, 0.0)
    tl.store(delta_base + statistics + queries, delta, mask=queries < end)
    lse = load_lse(lse_base + statistics, queries, end)
    k_base += head // heads_per_key * k_head
    v_base += head // heads_per_key * v_head
    dq = tl.zeros([QUERIES, WIDTH], tl.float32)
    last = tl.minimum(first + QUERIES, end) - 1
    for number in range(tl.load(tile + 4), tl.where(first < end, tl.load(tile + 5), 0)):
        start, unmasked, past, run = key_range(runs + number * RUN_WIDTH, first, last, KEYS, DROPOUT)
        dq = _differentiate_scores(
            dq, q, do, lse, delta, k_base, v_base, k_stride, v_stride, start, unmasked, queries, run, scale, softmax_scale, bias,
            dbias, draw, keep_scale, KEYS, HEAD_DIM, WIDTH, False, DROPOUT, BIAS, COORDINATES, GRAD_BIAS,
        )  # fmt: skip
        dq = _differentiate_scores(
            dq, q, do, lse, delta, k_base, v_base, k_stride, v_stride, unmasked, past, queries, run, scale, softmax_scale, bias,
            dbias, draw, keep_scale, KEYS, HEAD_DIM, WIDTH, True, DROPOUT, BIAS, COORDINATES, GRAD_BIAS,
        )  # fmt: skip
    store_rows(dq_base + head * dq_head, dq * softmax_scale, first, dq_stride, first, stop, QUERIES, HEAD_DIM, WIDTH)


@triton.jit
def _seen_by_queries(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_stride, do_stride, start, stop, keys, run, scale, softmax_scale, bias,
    draw, keep_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, BIAS: tl.constexpr, COORDINATES: tl.constexpr,
):  # fmt: skip
    """Add what the queries ``start ..`` before ``stop`` send to the keys of a tile. Held as [keys, queries]."""
    begin, end, fixed, slope, origin = run
    key0, key1, stream, head, identity, first_column, threshold = draw
    for first in range(start, stop, QUERIES):
        queries = first + tl.arange(0, QUERIES)
        # Queries from row ``end`` on are zeros whose lse is +inf: probability 0 without a mask.
        q = load_rows(q_base, first, q_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
        lse = load_lse(lse_base, queries, end)
        s = scores(k, q)
        if BIAS is not None:
            s = biased(s, softmax_scale, bias, keys[:, None], queries[None, :], origin, end, BIAS, COORDINATES, True)
        p = tl.exp2(s * scale - lse[None, :])
        if MASKED:
            release = tl.minimum(fixed, tl.maximum(begin, keys - slope))
            p = tl.where(queries[None, :] >= release[:, None], p, 0.0)
        do = load_rows(do_base, first, do_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
        dp = scores(v, do)
        if DROPOUT:
            kept = triton_math.keep_block(
                key0, key1, stream, head, identity, queries - origin, first_column, threshold, KEYS, True
            )
            dv = tl.dot(tl.where(kept, p * keep_scale, 0.0).to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.where(kept, dp * keep_scale, 0.0)
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (dp - load_statistics(delta_base, queries, end, 0.0)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def key_gradient_kernel(
    q_base, k_base, v_base, do_base, lse_base, delta_base, dk_base, dv_base, tiles, runs, rng_state,
    bias_base, samples, coordinates, kv_coordinates,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head, dk_stride, dk_head, dv_stride, dv_head,
    statistic_stride, heads_per_key, bias_sample, bias_head, bias_row, radius, scale, softmax_scale, stream, threshold, keep_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
    BIAS: tl.constexpr, COORDINATES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys and a key head: the sum over its query heads, readers and runs, in their order."""
    tile = tiles + tl.program_id(0) * TILE_WIDTH
    key_head = tl.program_id(1).to(tl.int64)
    first, tile_begin, end, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if first >= stop:
        return
    keys = first + tl.arange(0, KEYS)
    key_origin = tl.load(tile + 6)
    key0, key1 = 0, 0
    if DROPOUT:
        key0, key1 = triton_math.draw_key(rng_state)
    own = load_coordinates(kv_coordinates, keys[:, None], end, COORDINATES)
    k = load_rows(k_base + key_head * k_head, first, k_stride, end, KEYS, HEAD_DIM, WIDTH, True)
    v = load_rows(v_base + key_head * v_head, first, v_stride, end, KEYS, HEAD_DIM, WIDTH, True)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    last = tl.minimum(first + KEYS, end) - 1
    first_run, last_run = tl.load(tile + 4), tl.where(first < end, tl.load(tile + 5), 0)
    for member in range(0, heads_per_key):
        head = key_head * heads_per_key + member
        statistics = head * statistic_stride
        for number in range(first_run, last_run):
            fields = runs + number * RUN_WIDTH
            begin, run_end, fixed, slope = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
            origin, identity = tl.load(fields + 4), tl.load(fields + 5)
            run = begin, run_end, fixed, slope, origin
            draw = key0, key1, stream, head, identity, first - key_origin, threshold
            bias = bias_base, samples, bias_sample, bias_head, bias_row, radius
            some_query = tl.maximum(run_end - 1, 0)
            bias = open_bias(bias, head, some_query, key_origin, end, own, coordinates, BIAS)
            start = tl.minimum(fixed, tl.maximum(begin, first - slope))
            masked = tl.minimum(fixed, tl.maximum(begin, last - slope)) - start
            unmasked = tl.minimum(run_end, start + (masked + (QUERIES - 1)) // QUERIES * QUERIES)
            dk, dv = _seen_by_queries(
                dk, dv, k, v, q_base + head * q_head, do_base + head * do_head, lse_base + statistics, delta_base + statistics,
                q_stride, do_stride, start, unmasked, keys, run, scale, softmax_scale, bias, draw, keep_scale,
                QUERIES, KEYS, HEAD_DIM, WIDTH, True, DROPOUT, BIAS, COORDINATES,
            )  # fmt: skip
            dk, dv = _seen_by_queries(
                dk, dv, k, v, q_base + head * q_head, do_base + head * do_head, lse_base + statistics, delta_base + statistics,
                q_stride, do_stride, unmasked, run_end, keys, run, scale, softmax_scale, bias, draw, keep_scale,
                QUERIES, KEYS, HEAD_DIM, WIDTH, False, DROPOUT, BIAS, COORDINATES,
            )  # fmt: skip
    owned = (keys < end)[:, None]
    dk = tl.where(owned, dk * softmax_scale, 0.0)
    dv = tl.where(owned, dv, 0.0)
    store_rows(dk_base + key_head * dk_head, dk, first, dk_stride, tile_begin, stop, KEYS, HEAD_DIM, WIDTH)
    store_rows(dv_base + key_head * dv_head, dv, first, dv_stride, tile_begin, stop, KEYS, HEAD_DIM, WIDTH)
