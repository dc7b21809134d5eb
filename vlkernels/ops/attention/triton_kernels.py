"""impl "triton" on the device: one program for a tile of the work list and a head; see MATH.md for the loops and their tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import triton_math
from vlkernels.core.random import COLUMNS_PER_CALL
from vlkernels.ops.attention.triton_tiles import load_rows, load_statistics, scores, store_rows
from vlkernels.ops.attention.work_list import RUN_FIELDS, TILE_FIELDS

TILE_WIDTH, RUN_WIDTH = tl.constexpr(len(TILE_FIELDS)), tl.constexpr(len(RUN_FIELDS))
DRAWN_TOGETHER = tl.constexpr(COLUMNS_PER_CALL)
NOTHING = tl.constexpr(-float("inf"))

# Numbers that differ between calls of one model: specialising on them would compile a variant for each.
UNSPECIALIZED = ("statistic_stride", "stream", "threshold")


@triton.jit
def _key_range(run, first, last, sample_start, KEYS: tl.constexpr, DROPOUT: tl.constexpr):
    """Where queries ``first .. last`` meet the keys of a run: (start, end of what needs no mask, end of all, its fields)."""
    begin, end, fixed, slope = tl.load(run), tl.load(run + 1), tl.load(run + 2), tl.load(run + 3)
    origin = tl.load(run + 4)
    start = begin
    if DROPOUT:  # tiles of keys hold whole draws
        start = origin + (begin - origin) // DRAWN_TOGETHER * DRAWN_TOGETHER
    all_see = tl.minimum(end, tl.maximum(fixed, first + slope + 1))
    some_see = tl.minimum(end, tl.maximum(fixed, last + slope + 1))
    unmasked = start + tl.maximum(all_see - start, 0) // KEYS * KEYS
    if DROPOUT:
        unmasked = tl.where(start < begin, start, unmasked)
    return start, unmasked, tl.where(begin < end, some_see, start), begin, end, fixed, slope, origin


@triton.jit
def _visible(keys, queries, begin, end, fixed, slope):
    """bool over the broadcast: the run shows the key to the query."""
    limit = tl.minimum(end - 1, tl.maximum(fixed - 1, queries + slope))
    return (keys >= begin) & (keys <= limit)


@triton.jit
def _see_keys(
    acc, highest, total, q, k_base, v_base, k_stride, v_stride, start, stop, queries, begin, end, fixed, slope, scale,
    key0, key1, stream, head, identity, position, origin, threshold,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The online softmax of a tile of queries over the keys ``start ..`` before ``stop``, a tile at a time."""
    for first in range(start, stop, KEYS):
        k = load_rows(k_base, first, k_stride, end, KEYS, HEAD_DIM, WIDTH, MASKED)
        s = scores(q, k)
        if MASKED:
            keys = first + tl.arange(0, KEYS)
            s = tl.where(_visible(keys[None, :], queries[:, None], begin, end, fixed, slope), s, NOTHING)
        p, factor, highest, total = triton_math.online_softmax(s, highest, total, scale, MASKED)
        if DROPOUT:
            kept = triton_math.keep_block(key0, key1, stream, head, identity, position, first - origin, threshold, KEYS, False)
            p = tl.where(kept, p, 0.0)
        v = load_rows(v_base, first, v_stride, end, KEYS, HEAD_DIM, WIDTH, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
    return acc, highest, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q_base, k_base, v_base, out_base, lse_base, tiles, runs, rng_state,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head, statistic_stride, heads_per_key,
    scale, stream, threshold, keep_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
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
    q = load_rows(q_base + head * q_head, first, q_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
    k_base += head // heads_per_key * k_head
    v_base += head // heads_per_key * v_head
    acc = tl.zeros([QUERIES, WIDTH], tl.float32)
    highest = tl.full([QUERIES], NOTHING, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    last = tl.minimum(first + QUERIES, end) - 1
    for number in range(tl.load(tile + 4), tl.where(first < end, tl.load(tile + 5), 0)):
        run = runs + number * RUN_WIDTH
        start, unmasked, past, run_begin, run_end, fixed, slope, key_origin = _key_range(run, first, last, origin, KEYS, DROPOUT)
        acc, highest, total = _see_keys(
            acc, highest, total, q, k_base, v_base, k_stride, v_stride, start, unmasked, queries, run_begin, run_end, fixed,
            slope, scale, key0, key1, stream, head, identity, queries - origin, key_origin, threshold,
            KEYS, HEAD_DIM, WIDTH, False, DROPOUT,
        )  # fmt: skip
        acc, highest, total = _see_keys(
            acc, highest, total, q, k_base, v_base, k_stride, v_stride, unmasked, past, queries, run_begin, run_end, fixed,
            slope, scale, key0, key1, stream, head, identity, queries - origin, key_origin, threshold,
            KEYS, HEAD_DIM, WIDTH, True, DROPOUT,
        )  # fmt: skip
    blind = (total == 0.0) | (queries >= end)
    share = tl.where(blind, 0.0, keep_scale / tl.where(blind, 1.0, total))
    lse = tl.where(blind, NOTHING, (highest + tl.log2(tl.where(blind, 1.0, total))) * triton_math.LN_2)
    tl.store(lse_base + head * statistic_stride + queries, lse, mask=queries < stop)
    acc = tl.where(blind[:, None], 0.0, acc * share[:, None])
    store_rows(out_base + head * out_head, acc, first, out_stride, first, stop, QUERIES, HEAD_DIM, WIDTH)


@triton.jit
def _differentiate_scores(
    dq, q, do, lse, delta, k_base, v_base, k_stride, v_stride, start, stop, queries, begin, end, fixed, slope, scale,
    key0, key1, stream, head, identity, position, origin, threshold, keep_scale,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add ds k to dq for the keys ``start ..`` before ``stop``."""
    for first in range(start, stop, KEYS):
        k = load_rows(k_base, first, k_stride, end, KEYS, HEAD_DIM, WIDTH, MASKED)
        v = load_rows(v_base, first, v_stride, end, KEYS, HEAD_DIM, WIDTH, MASKED)
        p = tl.exp2(scores(q, k) * scale - lse[:, None])
        if MASKED:
            keys = first + tl.arange(0, KEYS)
            p = tl.where(_visible(keys[None, :], queries[:, None], begin, end, fixed, slope), p, 0.0)
        dp = scores(do, v)
        if DROPOUT:
            kept = triton_math.keep_block(key0, key1, stream, head, identity, position, first - origin, threshold, KEYS, False)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_gradient_kernel(
    q_base, k_base, v_base, out_base, do_base, lse_base, grad_lse_base, delta_base, dq_base, tiles, runs, rng_state,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head, do_stride, do_head, dq_stride, dq_head,
    statistic_stride, heads_per_key, scale, softmax_scale, stream, threshold, keep_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries and a head; leaves delta for the kernel of the keys."""
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
    q = load_rows(q_base + head * q_head, first, q_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
    do = load_rows(do_base + head * do_head, first, do_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
    out = load_rows(out_base + head * out_head, first, out_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
    statistics = head * statistic_stride
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if GRAD_LSE:
        delta -= load_statistics(grad_lse_base + statistics, queries, end, 0.0)
    tl.store(delta_base + statistics + queries, delta, mask=queries < end)
    lse = load_statistics(lse_base + statistics, queries, end, NOTHING)
    # A row that sees nothing has lse = -inf: +inf gives it probability 0 everywhere.
    lse = tl.where(lse == NOTHING, float("inf"), lse * triton_math.LOG2_E)
    k_base += head // heads_per_key * k_head
    v_base += head // heads_per_key * v_head
    dq = tl.zeros([QUERIES, WIDTH], tl.float32)
    last = tl.minimum(first + QUERIES, end) - 1
    for number in range(tl.load(tile + 4), tl.where(first < end, tl.load(tile + 5), 0)):
        run = runs + number * RUN_WIDTH
        start, unmasked, past, run_begin, run_end, fixed, slope, key_origin = _key_range(run, first, last, origin, KEYS, DROPOUT)
        dq = _differentiate_scores(
            dq, q, do, lse, delta, k_base, v_base, k_stride, v_stride, start, unmasked, queries, run_begin, run_end, fixed,
            slope, scale, key0, key1, stream, head, identity, queries - origin, key_origin, threshold, keep_scale,
            KEYS, HEAD_DIM, WIDTH, False, DROPOUT,
        )  # fmt: skip
        dq = _differentiate_scores(
            dq, q, do, lse, delta, k_base, v_base, k_stride, v_stride, unmasked, past, queries, run_begin, run_end, fixed,
            slope, scale, key0, key1, stream, head, identity, queries - origin, key_origin, threshold, keep_scale,
            KEYS, HEAD_DIM, WIDTH, True, DROPOUT,
        )  # fmt: skip
    store_rows(dq_base + head * dq_head, dq * softmax_scale, first, dq_stride, first, stop, QUERIES, HEAD_DIM, WIDTH)


@triton.jit
def _seen_by_queries(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_stride, do_stride, start, stop, keys, begin, end, fixed, slope,
    scale, key0, key1, stream, head, identity, first_column, origin, threshold, keep_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Add what the queries ``start ..`` before ``stop`` send to the keys of a tile. Held as [keys, queries]."""
    for first in range(start, stop, QUERIES):
        queries = first + tl.arange(0, QUERIES)
        # Queries from row ``end`` on are zeros whose lse is +inf: probability 0 without a mask.
        q = load_rows(q_base, first, q_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
        lse = load_statistics(lse_base, queries, end, NOTHING)
        lse = tl.where(lse == NOTHING, float("inf"), lse * triton_math.LOG2_E)
        p = tl.exp2(scores(k, q) * scale - lse[None, :])
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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_gradient_kernel(
    q_base, k_base, v_base, do_base, lse_base, delta_base, dk_base, dv_base, tiles, runs, rng_state,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head, dk_stride, dk_head, dv_stride, dv_head,
    statistic_stride, heads_per_key, scale, softmax_scale, stream, threshold, keep_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys and a key head: the sum over its query heads, readers and runs, in their order."""
    tile = tiles + tl.program_id(0) * TILE_WIDTH
    key_head = tl.program_id(1).to(tl.int64)
    first, tile_begin, end, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if first >= stop:
        return
    keys = first + tl.arange(0, KEYS)
    first_column = first - tl.load(tile + 6)
    key0, key1 = 0, 0
    if DROPOUT:
        key0, key1 = triton_math.draw_key(rng_state)
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
            run = runs + number * RUN_WIDTH
            run_begin, run_end, fixed, slope = tl.load(run), tl.load(run + 1), tl.load(run + 2), tl.load(run + 3)
            origin, identity = tl.load(run + 4), tl.load(run + 5)
            start = tl.minimum(fixed, tl.maximum(run_begin, first - slope))
            masked = tl.minimum(fixed, tl.maximum(run_begin, last - slope)) - start
            unmasked = tl.minimum(run_end, start + (masked + (QUERIES - 1)) // QUERIES * QUERIES)
            dk, dv = _seen_by_queries(
                dk, dv, k, v, q_base + head * q_head, do_base + head * do_head, lse_base + statistics, delta_base + statistics,
                q_stride, do_stride, start, unmasked, keys, run_begin, run_end, fixed, slope, scale,
                key0, key1, stream, head, identity, first_column, origin, threshold, keep_scale,
                QUERIES, KEYS, HEAD_DIM, WIDTH, True, DROPOUT,
            )  # fmt: skip
            dk, dv = _seen_by_queries(
                dk, dv, k, v, q_base + head * q_head, do_base + head * do_head, lse_base + statistics, delta_base + statistics,
                q_stride, do_stride, unmasked, run_end, keys, run_begin, run_end, fixed, slope, scale,
                key0, key1, stream, head, identity, first_column, origin, threshold, keep_scale,
                QUERIES, KEYS, HEAD_DIM, WIDTH, False, DROPOUT,
            )  # fmt: skip
    owned = (keys < end)[:, None]
    dk = tl.where(owned, dk * softmax_scale, 0.0)
    dv = tl.where(owned, dv, 0.0)
    store_rows(dk_base + key_head * dk_head, dk, first, dk_stride, tile_begin, stop, KEYS, HEAD_DIM, WIDTH)
    store_rows(dv_base + key_head * dv_head, dv, first, dv_stride, tile_begin, stop, KEYS, HEAD_DIM, WIDTH)
