"""The work list of a side in one kernel: a program takes some groups, writes their tiles and the runs they meet.

Where its tiles stand a program counts for itself: it measures every group of the batch and adds up the tiles of those that come
before, so programs share nothing and a list is a pure function of the lengths. That is quadratic in the number of groups, in
steps of ``OTHERS`` of them. Lengths and tables are data, of any S <= 16. A group has the number of its sample times S plus its
first segment; the numbers between belong to no group, and have no tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import layout, mask

MOST_SEGMENTS = tl.constexpr(layout.MAX_SEGMENTS)
NONE, FULL, CAUSAL = tl.constexpr(mask.NONE), tl.constexpr(mask.FULL), tl.constexpr(mask.CAUSAL)
TOGETHER = tl.constexpr(16)  # tiles of a group that are written at once
REST = tl.constexpr(512)  # integers behind the last tile that are cleared at once

# Everything a call says is data: no length, alignment or table compiles another variant.
NUMBERS = ("samples", "key_samples", "segments", "key_segments", "tokens", "most_tiles", "block", "multiple")
POINTERS = (
    "tiles", "runs", "starts", "lengths", "kv_starts", "kv_lengths", "kv_index", "table", "sample_ids",
    "places", "bounds", "met",
)  # fmt: skip


@triton.jit
def _opening_segments(table, rows, columns, row_stride, column_stride):
    """bool [MOST]: a group opens at the segment; neighbours of equal rows without causal cells are one group."""
    row, column = tl.arange(0, MOST_SEGMENTS)[:, None], tl.arange(0, MOST_SEGMENTS)[None, :]
    cell = table + row * row_stride + column * column_stride
    inside = (row < rows) & (column < columns)
    codes = tl.load(cell, mask=inside, other=NONE)
    before = tl.load(cell - row_stride, mask=inside & (row > 0), other=NONE)
    cuts = tl.max(((codes != before) | (codes == CAUSAL)).to(tl.int32), 1) > 0
    segment = tl.arange(0, MOST_SEGMENTS)
    return (cuts | (segment == 0)) & (segment < rows)


@triton.jit
def _group(opens, segment, segments):
    """(a group opens at the segment, its last segment)."""
    index = tl.arange(0, MOST_SEGMENTS)[None, :]
    leads = tl.max(((index == segment[:, None]) & opens[None, :]).to(tl.int32), 1) > 0
    last = tl.min(tl.where((index > segment[:, None]) & opens[None, :], index, segments), 1) - 1
    return leads, last


@triton.jit
def _count(inside, leads, starts, lengths, sample, samples, segments, segment, last, tokens, block, multiple):
    """(first row of the tiles, begin, end, stop, first row of the sample, number of tiles) of groups."""
    row = sample * segments
    origin = tl.load(starts + row, mask=inside, other=0)
    begin = tl.load(starts + row + segment, mask=inside, other=0)
    end = tl.load(starts + row + last, mask=inside, other=0) + tl.load(lengths + row + last, mask=inside, other=0)
    # The last group of a sample reaches to the next sample: rows that belong to nobody are written by its tiles.
    behind = tl.load(starts + row + segments, mask=sample + 1 < samples, other=0)
    stop = tl.where(last + 1 < segments, end, tl.where(sample + 1 < samples, behind, tokens))
    first = origin + (begin - origin) // multiple * multiple
    count = tl.where(inside & leads, tl.maximum(stop - first + (block - 1), 0) // block, 0)
    return first, begin, end, stop, origin, count


@triton.jit
def _met(inside, lengths, sample, segments, codes, stride):
    """How many rows of the other stream groups meet: ``lengths`` [., segments] are those rows, ``codes`` the group's cells."""
    segment = tl.arange(0, MOST_SEGMENTS)[None, :]
    inside = inside[:, None] & (segment < segments)
    code = tl.load(codes[:, None] + segment * stride, mask=inside, other=NONE)
    return tl.sum(tl.load(lengths + sample[:, None] * segments + segment, mask=inside & (code != NONE), other=0), 1)


@triton.jit
def _tiles_before(
    number, met, opens, starts, lengths, samples, segments, other_lengths, other_index, other_segments, table, row_stride,
    column_stride, tokens, block, multiple, GROUPS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """(tiles of the groups that come before each of ours, tiles of all): who meets more comes first, then a lower number."""
    before = tl.zeros([GROUPS], tl.int32)
    total = 0
    for start in range(0, samples * segments, OTHERS):
        other = start + tl.arange(0, OTHERS)
        inside = other < samples * segments
        sample, segment = other // segments, other % segments
        leads, last = _group(opens, segment, segments)
        count = _count(inside, leads, starts, lengths, sample, samples, segments, segment, last, tokens, block, multiple)[5]
        read = sample
        if other_index is not None:
            read = tl.load(other_index + sample, mask=inside, other=0).to(tl.int32)
        other_met = _met(inside, other_lengths, read, other_segments, table + segment * row_stride, column_stride)[None, :]
        equal = (other_met == met[:, None]) & (other[None, :] < number[:, None])
        before += tl.sum(tl.where((other_met > met[:, None]) | equal, count[None, :], 0), 1)
        total += tl.sum(count, 0)
    return before, total


@triton.jit
def _write_tiles(
    tiles, place, count, first, begin, end, stop, first_run, last_run, origin, identity, block, TILE_WIDTH: tl.constexpr
):  # fmt: skip
    """The tiles of some groups from place to place, the last of each group first: below a diagonal it has most to do."""
    for done in range(0, tl.max(count, 0), TOGETHER):
        number = done + tl.arange(0, TOGETHER)[None, :]
        inside = number < count[:, None]
        tile = tiles + (place[:, None] + number) * TILE_WIDTH
        tl.store(tile, first[:, None] + (count[:, None] - 1 - number) * block, mask=inside)
        tl.store(tile + 1, begin[:, None], mask=inside)
        tl.store(tile + 2, end[:, None], mask=inside)
        tl.store(tile + 3, stop[:, None], mask=inside)
        tl.store(tile + 4, first_run[:, None], mask=inside)
        tl.store(tile + 5, last_run[:, None], mask=inside)
        tl.store(tile + 6, origin[:, None], mask=inside)
        tl.store(tile + 7, identity[:, None], mask=inside)


@triton.jit
def _clear_the_rest(tiles, total, most_tiles, TILE_WIDTH: tl.constexpr):
    """Tiles past the real ones have no rows; all programs share them."""
    first, step = total * TILE_WIDTH + tl.program_id(0) * REST, tl.num_programs(0) * REST
    for start in range(first, most_tiles * TILE_WIDTH, step):
        place = start + tl.arange(0, REST)
        tl.store(tiles + place, tl.zeros([REST], tl.int32), mask=place < most_tiles * TILE_WIDTH)


@triton.jit
def _write_run(run, inside, begin, end, fixed, slope, origin, identity):
    tl.store(run, begin, mask=inside)
    tl.store(run + 1, end, mask=inside)
    tl.store(run + 2, fixed, mask=inside)
    tl.store(run + 3, slope, mask=inside)
    tl.store(run + 4, origin, mask=inside)
    tl.store(run + 5, identity, mask=inside)


@triton.jit
def _write_query_runs(
    runs, inside, codes, query_end, kv_starts, kv_lengths, read, key_segments, GROUPS: tl.constexpr, RUN_WIDTH: tl.constexpr
):  # fmt: skip
    """The runs of keys that groups of queries see, one after the other at ``runs``; how many they are.

    A run ends with its causal segment, or before one that is hidden.
    """
    row = read * key_segments
    origin = tl.load(kv_starts + row, mask=inside, other=0)
    number, before, begin = tl.zeros([GROUPS], tl.int32), tl.full([GROUPS], NONE, tl.int32), origin
    for segment in range(0, key_segments):
        code = tl.load(codes + segment, mask=inside, other=NONE)
        after = tl.load(codes + segment + 1, mask=inside & (segment + 1 < key_segments), other=NONE)
        start = tl.load(kv_starts + row + segment, mask=inside, other=0)
        end = start + tl.load(kv_lengths + row + segment, mask=inside, other=0)
        begin = tl.where((code != NONE) & (before != FULL), start, begin)
        closes = (code == CAUSAL) | ((code != NONE) & (after == NONE))
        fixed = tl.where(code == CAUSAL, start, end)
        _write_run(runs + number * RUN_WIDTH, closes, begin, end, fixed, end - query_end, origin, 0)
        number += closes.to(tl.int32)
        before = code
    return number


@triton.jit
def _write_key_runs(
    runs, inside, codes, stride, key_end, starts, lengths, reader, segments, identity,
    GROUPS: tl.constexpr, RUN_WIDTH: tl.constexpr,
):  # fmt: skip
    """The runs of queries of a reader that see a segment of keys, one after the other at ``runs``.

    A run opens with its causal segment, or with a full one behind a hidden one.
    """
    row = reader * segments
    origin = tl.load(starts + row, mask=inside, other=0)
    number, before = tl.zeros([GROUPS], tl.int32), tl.full([GROUPS], NONE, tl.int32)
    begin, fixed, slope = origin, origin, origin
    for segment in range(0, segments):
        code = tl.load(codes + segment * stride, mask=inside, other=NONE)
        after = tl.load(codes + (segment + 1) * stride, mask=inside & (segment + 1 < segments), other=NONE)
        start = tl.load(starts + row + segment, mask=inside, other=0)
        end = start + tl.load(lengths + row + segment, mask=inside, other=0)
        opens = (code == CAUSAL) | ((code == FULL) & (before == NONE))
        begin = tl.where(opens, start, begin)
        fixed = tl.where(opens, tl.where(code == CAUSAL, end, start), fixed)
        slope = tl.where(opens, key_end - end, slope)
        closes = (code != NONE) & (after != FULL)
        _write_run(runs + number * RUN_WIDTH, closes, begin, end, fixed, slope, origin, identity)
        number += closes.to(tl.int32)
        before = code


@triton.jit
def _number_of_key_runs(inside, codes, stride, segments):
    """How many runs of a reader see a segment of keys: the same for every reader."""
    segment = tl.arange(0, MOST_SEGMENTS)[None, :]
    cell = codes[:, None] + segment * stride
    code = tl.load(cell, mask=inside[:, None] & (segment < segments), other=NONE)
    after = tl.load(cell + stride, mask=inside[:, None] & (segment + 1 < segments), other=NONE)
    return tl.sum(((code != NONE) & (after != FULL)).to(tl.int32), 1)


@triton.jit
def _identity(sample_ids, sample, inside, GROUPS: tl.constexpr):
    if sample_ids is None:
        return tl.zeros([GROUPS], tl.int32)
    else:
        return tl.load(sample_ids + sample, mask=inside, other=0)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def query_side_kernel(
    tiles, runs, starts, lengths, kv_starts, kv_lengths, kv_index, table, sample_ids,
    samples, segments, key_segments, tokens, most_tiles, block,
    GROUPS: tl.constexpr, OTHERS: tl.constexpr, TILE_WIDTH: tl.constexpr, RUN_WIDTH: tl.constexpr,
):  # fmt: skip
    """Tiles of queries and the runs of keys each of them sees."""
    number = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    sample, segment = number // segments, number % segments
    inside = sample < samples
    read = sample
    if kv_index is not None:
        read = tl.load(kv_index + sample, mask=inside, other=0).to(tl.int32)
    opens = _opening_segments(table, segments, key_segments, key_segments, 1)
    leads, last = _group(opens, segment, segments)
    codes = table + segment * key_segments

    query_end = tl.load(starts + number, mask=inside, other=0) + tl.load(lengths + number, mask=inside, other=0)
    first_run = number * key_segments
    found = _write_query_runs(
        runs + first_run * RUN_WIDTH, inside & leads, codes, query_end, kv_starts, kv_lengths, read, key_segments,
        GROUPS, RUN_WIDTH,
    )  # fmt: skip

    met = _met(inside, kv_lengths, read, key_segments, codes, 1)
    before, total = _tiles_before(
        number, met, opens, starts, lengths, samples, segments, kv_lengths, kv_index, key_segments, table, key_segments, 1,
        tokens, block, 1, GROUPS, OTHERS,
    )  # fmt: skip
    first, begin, end, stop, origin, count = _count(
        inside, leads, starts, lengths, sample, samples, segments, segment, last, tokens, block, 1
    )
    identity = _identity(sample_ids, sample, inside, GROUPS)
    _write_tiles(
        tiles, before, count, first, begin, end, stop, first_run, first_run + found, origin, identity, block, TILE_WIDTH
    )
    _clear_the_rest(tiles, total, most_tiles, TILE_WIDTH)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def key_side_kernel(
    tiles, runs, starts, lengths, kv_starts, kv_lengths, kv_index, table, sample_ids, places, bounds, met,
    samples, key_samples, segments, key_segments, tokens, most_tiles, block, multiple,
    GROUPS: tl.constexpr, OTHERS: tl.constexpr, TILE_WIDTH: tl.constexpr, RUN_WIDTH: tl.constexpr,
):  # fmt: skip
    """Tiles of keys and the runs of queries that see them, reader after reader.

    With ``kv_index``, ``places``, ``bounds`` and ``met`` are what :func:`readers_kernel` found; ``met`` is ``lengths`` without.
    """
    number = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    sample, segment = number // key_segments, number % key_segments
    opens = _opening_segments(table, key_segments, segments, 1, key_segments)
    leads, last = _group(opens, segment, key_segments)
    codes = table + segment
    each = _number_of_key_runs(leads, codes, key_segments, segments)
    first_run = segment * (samples * segments)

    inside = sample < samples  # the sample as a reader
    read, place = sample, sample
    if kv_index is not None:
        read = tl.load(kv_index + sample, mask=inside, other=0).to(tl.int32)
        place = tl.load(places + sample, mask=inside, other=0)
    key = read * key_segments + segment
    key_end = tl.load(kv_starts + key, mask=inside, other=0) + tl.load(kv_lengths + key, mask=inside, other=0)
    _write_key_runs(
        runs + (first_run + place * each) * RUN_WIDTH, inside & leads, codes, key_segments, key_end, starts, lengths, sample,
        segments, _identity(sample_ids, sample, inside, GROUPS), GROUPS, RUN_WIDTH,
    )  # fmt: skip

    inside = sample < key_samples  # the sample as the one that is read
    first_reader, last_reader = sample, sample + 1
    if kv_index is not None:
        first_reader = tl.load(bounds + sample, mask=inside, other=0)
        last_reader = tl.load(bounds + sample + 1, mask=inside, other=0)
    before, total = _tiles_before(
        number, _met(inside, met, sample, segments, codes, key_segments), opens, kv_starts, kv_lengths, key_samples,
        key_segments, met, None, segments, table, 1, key_segments, tokens, block, multiple, GROUPS, OTHERS,
    )  # fmt: skip
    first, begin, end, stop, origin, count = _count(
        inside, leads, kv_starts, kv_lengths, sample, key_samples, key_segments, segment, last, tokens, block, multiple
    )
    _write_tiles(
        tiles, before, count, first, begin, end, stop, first_run + first_reader * each, first_run + last_reader * each, origin,
        tl.zeros([GROUPS], tl.int32), block, TILE_WIDTH,
    )  # fmt: skip
    _clear_the_rest(tiles, total, most_tiles, TILE_WIDTH)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def readers_kernel(
    places, bounds, met, kv_index, lengths, samples, key_samples, segments, GROUPS: tl.constexpr, OTHERS: tl.constexpr
):  # fmt: skip
    """The readers of a key sample follow each other, in their order.

    ``places`` [B]: where a reader stands; ``bounds`` [Bk + 1]: where the readers of a key sample begin; ``met`` [Bk, S]: how
    many rows its readers have in each segment.
    """
    number = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    sample, segment = number // segments, (number % segments)[:, None]
    own = tl.load(kv_index + sample, mask=sample < samples, other=0).to(tl.int32)[:, None]
    key = sample[:, None]
    place = tl.zeros([GROUPS], tl.int32)
    bound, rows = place, place
    for start in range(0, samples, OTHERS):
        reader = start + tl.arange(0, OTHERS)[None, :]
        read = tl.load(kv_index + reader, mask=reader < samples, other=key_samples).to(tl.int32)
        place += tl.sum(((read < own) | ((read == own) & (reader < key))).to(tl.int32), 1)
        bound += tl.sum((read < key).to(tl.int32), 1)
        rows += tl.sum(tl.load(lengths + reader * segments + segment, mask=(read == key) & (reader < samples), other=0), 1)
    tl.store(places + sample, place, mask=sample < samples)
    tl.store(bounds + sample, bound, mask=sample <= key_samples)
    tl.store(met + number, rows, mask=sample < key_samples)
