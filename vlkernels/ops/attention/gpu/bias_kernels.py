"""impl "triton" on the device: the gradients of a bias that samples or heads share, computed from ds once more; see MATH.md."""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import layout, triton_math
from vlkernels.ops.attention.gpu.kernels import RUN_WIDTH, TILE_WIDTH, UNALIGNED, UNSPECIALIZED, key_range, visible
from vlkernels.ops.attention.gpu.tile_functions import (
    biased, load_coordinates, load_lse, load_rows, load_statistics, open_bias, planar_bias, scores,
)  # fmt: skip

# A row's word has a bit for every segment it sees in full and, this many places higher, for every one it sees causally.
MOST_SEGMENTS = tl.constexpr(layout.MAX_SEGMENTS)
UNSPECIALIZED_PLANE = (
    "statistic_stride", "stream", "threshold", "bias_sample", "bias_head", "bias_row", "heads", "sharing_samples",
    "sharing_heads", "samples_at_once", "segments", "key_segments", "plane_queries", "plane_keys",
)  # fmt: skip
UNALIGNED_PLANE = ("bias_base", "starts", "lengths", "kv_starts", "kv_lengths", "kv_index", "sample_ids")


@triton.jit
def _extent(starts, lengths, sample, segments):
    """(first row, number of rows) of a sample."""
    last = (sample + 1) * segments - 1
    origin = tl.load(starts + sample * segments)
    return origin, tl.load(starts + last) + tl.load(lengths + last) - origin


@triton.jit
def _seen(query_marks, key_marks, queries, keys, query_end, key_end):
    """bool [queries, keys] by the marks of both rows: (word, rows to the end of its segment) and (segment, the same)."""
    inside = queries < query_end
    word = tl.load(query_marks + queries * 2, mask=inside, other=0)[:, None]
    left = tl.load(query_marks + queries * 2 + 1, mask=inside, other=0)[:, None]
    inside = keys < key_end
    segment = tl.load(key_marks + keys * 2, mask=inside, other=0)[None, :]
    key_left = tl.load(key_marks + keys * 2 + 1, mask=inside, other=0)[None, :]
    shown = (word >> segment) & 1
    causal = (word >> (segment + MOST_SEGMENTS)) & 1
    return ((shown | (causal & (key_left >= left).to(tl.int32))) > 0) & (keys < key_end)[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED_PLANE, do_not_specialize_on_alignment=UNALIGNED_PLANE)
def shared_gradient_kernel(
    q_base, k_base, v_base, do_base, lse_base, delta_base, bias_base, partial_base,
    starts, lengths, kv_starts, kv_lengths, kv_index, query_marks, key_marks, sample_ids, rng_state,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head, statistic_stride, heads_per_key,
    bias_sample, bias_head, bias_row, heads, sharing_samples, sharing_heads, samples_at_once, segments, key_segments,
    plane_queries, plane_keys, softmax_scale, stream, threshold, keep_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """ds of a tile of a plane of the bias, summed over some of the samples and all of the heads that share it, in their order.

    ``heads``: planes of the bias for a sample. Programs: the tiles of all planes, times parts of the samples.
    """
    across = tl.cdiv(plane_keys, KEYS)
    tiles = tl.cdiv(plane_queries, QUERIES) * across
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    first_query, first_key = tile // across * QUERIES, tile % across * KEYS
    rows, columns = first_query + tl.arange(0, QUERIES), first_key + tl.arange(0, KEYS)
    base = bias_base + plane // heads * bias_sample + plane % heads * bias_head
    bias = planar_bias(base, bias_row, rows[:, None], 0, plane_queries, columns[None, :], 0, plane_keys)
    key0, key1 = 0, 0
    if DROPOUT:
        key0, key1 = triton_math.draw_key(rng_state)
    total = tl.zeros([QUERIES, KEYS], tl.float32)
    part = tl.program_id(1) * samples_at_once
    for number in range(part, tl.minimum(part + samples_at_once, sharing_samples)):
        sample = plane // heads * sharing_samples + number
        origin, length = _extent(starts, lengths, sample, segments)
        key_sample, identity = sample, sample
        if kv_index is not None:
            key_sample = tl.load(kv_index + sample).to(tl.int64)
        key_origin, key_length = _extent(kv_starts, kv_lengths, key_sample, key_segments)
        if DROPOUT:
            identity = tl.load(sample_ids + sample)
        end, key_end = origin + length, key_origin + key_length
        queries, keys = origin + rows, key_origin + columns
        seen = _seen(query_marks, key_marks, queries, keys, end, key_end)
        reached = (first_query < length) & (first_key < key_length)
        for member in range(0, tl.where(reached, sharing_heads, 0)):
            head = plane % heads * sharing_heads + member
            q = load_rows(q_base + head * q_head, origin + first_query, q_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
            k_head_base, v_head_base = k_base + head // heads_per_key * k_head, v_base + head // heads_per_key * v_head
            k = load_rows(k_head_base, key_origin + first_key, k_stride, key_end, KEYS, HEAD_DIM, WIDTH, True)
            v = load_rows(v_head_base, key_origin + first_key, v_stride, key_end, KEYS, HEAD_DIM, WIDTH, True)
            do = load_rows(do_base + head * do_head, origin + first_query, do_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
            lse = load_lse(lse_base + head * statistic_stride, queries, end)
            p = tl.exp2((scores(q, k) * softmax_scale + bias) * triton_math.LOG2_E - lse[:, None])
            p = tl.where(seen, p, 0.0)
            dp = scores(do, v)
            if DROPOUT:
                kept = triton_math.keep_block(key0, key1, stream, head, identity, rows, first_key, threshold, KEYS, False)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            total += p * (dp - load_statistics(delta_base + head * statistic_stride, queries, end, 0.0)[:, None])
    planes = tl.num_programs(0) // tiles
    out = partial_base + (tl.program_id(1) * planes + plane) * plane_queries * plane_keys
    pointers = out + rows.to(tl.int64)[:, None] * plane_keys + columns[None, :]
    inside = (rows < plane_queries)[:, None] & (columns < plane_keys)[None, :]
    tl.store(pointers, total.to(partial_base.dtype.element_ty), mask=inside)


@triton.jit
def _count_distances(
    low, high, q, do, lse, delta, k_base, v_base, k_stride, v_stride, start, stop, queries, run, softmax_scale, bias, draw,
    keep_scale, counts, fixed,
    KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    COORDINATES: tl.constexpr,
):  # fmt: skip
    """Add ds to the counts of its distances for the keys ``start ..`` before ``stop``; what was clamped, to ``low`` and ``high``."""
    end, origin = run[1], run[4]
    key0, key1, stream, head, identity, position, threshold = draw
    _, radius, of_queries, coordinates = bias
    for first in range(start, stop, KEYS):
        k = load_rows(k_base, first, k_stride, end, KEYS, HEAD_DIM, WIDTH, MASKED)
        v = load_rows(v_base, first, v_stride, end, KEYS, HEAD_DIM, WIDTH, MASKED)
        keys = first + tl.arange(0, KEYS)
        s = biased(
            scores(q, k), softmax_scale, bias, queries[:, None], keys[None, :], origin, end, "relative", COORDINATES, False
        )  # fmt: skip
        p = tl.exp2(s * triton_math.LOG2_E - lse[:, None])
        if MASKED:
            p = tl.where(visible(keys[None, :], queries[:, None], run), p, 0.0)
        dp = scores(do, v)
        if DROPOUT:
            kept = triton_math.keep_block(key0, key1, stream, head, identity, position, first - origin, threshold, KEYS, False)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        counted = (ds * fixed).to(tl.int64)
        of_keys = load_coordinates(coordinates, keys[None, :], end, COORDINATES)
        lower, higher = (), ()
        for c in tl.static_range(COORDINATES):
            distance = of_keys[c] - of_queries[c]
            lower = lower + (low[c] + tl.sum(tl.where(distance <= -radius, ds, 0.0), 1),)
            higher = higher + (high[c] + tl.sum(tl.where(distance >= radius, ds, 0.0), 1),)
            row = counts + c * (2 * radius + 1) + radius
            inner = (distance > -radius) & (distance < radius) & (p != 0)
            tl.atomic_add(row + distance, counted, mask=inner, sem="relaxed")
        low, high = lower, higher
    return low, high


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "replicas"), do_not_specialize_on_alignment=UNALIGNED)
def distance_gradient_kernel(
    q_base, k_base, v_base, do_base, lse_base, delta_base, counts_base, fixed_base, tiles, runs, rng_state,
    bias_base, samples, coordinates, kv_coordinates,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head, statistic_stride, heads_per_key, replicas,
    bias_sample, bias_head, bias_row, radius, softmax_scale, stream, threshold, keep_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
    COORDINATES: tl.constexpr,
):  # fmt: skip
    """Add ds of a tile of queries and a head to one of the replicas of the counts, int64 [replicas, H, C, 2 radius + 1].

    Integers, so that the order of the programs changes no bit; ``fixed_base`` holds what ds is multiplied by.
    """
    tile = tiles + tl.program_id(0) * TILE_WIDTH
    head = tl.program_id(1).to(tl.int64)
    first, end = tl.load(tile), tl.load(tile + 2)
    if first >= end:
        return
    queries = first + tl.arange(0, QUERIES)
    origin, identity = tl.load(tile + 6), tl.load(tile + 7)
    key0, key1 = 0, 0
    if DROPOUT:
        key0, key1 = triton_math.draw_key(rng_state)
    draw = key0, key1, stream, head, identity, queries - origin, threshold
    own = load_coordinates(coordinates, queries[:, None], end, COORDINATES)
    bias = bias_base, samples, bias_sample, bias_head, bias_row, radius
    bias = open_bias(bias, head, first, origin, end, own, kv_coordinates, "relative")
    entries = COORDINATES * (2 * radius + 1)
    counts = counts_base + (tl.program_id(0) % replicas * tl.num_programs(1) + head) * entries
    fixed = tl.load(fixed_base)
    q = load_rows(q_base + head * q_head, first, q_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
    do = load_rows(do_base + head * do_head, first, do_stride, end, QUERIES, HEAD_DIM, WIDTH, True)
    lse = load_lse(lse_base + head * statistic_stride, queries, end)
    delta = load_statistics(delta_base + head * statistic_stride, queries, end, 0.0)
    k_base += head // heads_per_key * k_head
    v_base += head // heads_per_key * v_head
    low, high = (), ()
    for _ in tl.static_range(COORDINATES):
        low, high = low + (tl.zeros([QUERIES], tl.float32),), high + (tl.zeros([QUERIES], tl.float32),)
    last = tl.minimum(first + QUERIES, end) - 1
    for number in range(tl.load(tile + 4), tl.load(tile + 5)):
        start, unmasked, past, run = key_range(runs + number * RUN_WIDTH, first, last, KEYS, DROPOUT)
        low, high = _count_distances(
            low, high, q, do, lse, delta, k_base, v_base, k_stride, v_stride, start, unmasked, queries, run, softmax_scale,
            bias, draw, keep_scale, counts, fixed, KEYS, HEAD_DIM, WIDTH, False, DROPOUT, COORDINATES,
        )  # fmt: skip
        low, high = _count_distances(
            low, high, q, do, lse, delta, k_base, v_base, k_stride, v_stride, unmasked, past, queries, run, softmax_scale,
            bias, draw, keep_scale, counts, fixed, KEYS, HEAD_DIM, WIDTH, True, DROPOUT, COORDINATES,
        )  # fmt: skip
    for c in tl.static_range(COORDINATES):
        row = counts + c * (2 * radius + 1)
        tl.atomic_add(row, (tl.sum(low[c], 0) * fixed).to(tl.int64), sem="relaxed")
        tl.atomic_add(row + 2 * radius, (tl.sum(high[c], 0) * fixed).to(tl.int64), sem="relaxed")
