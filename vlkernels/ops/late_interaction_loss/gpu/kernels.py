"""The kernels of impl "triton": maxima and their places from one visit of a tile, gradients by products with one-hot weights.

A tile has a *slot* of ``SLOT`` rows for each of ``GROUP`` samples. What a sample leaves of its slot repeats its last token,
which changes no maximum; samples longer than a slot are taken chunk by chunk. Places are kept as ``[samples of the other side,
tokens]``.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-float("inf"))
NO_PLACE = tl.constexpr(1 << 62)
PLACE_BITS = tl.constexpr(32)

# Numbers that differ between calls of one model: specialising on them would compile a variant for each.
UNSPECIALIZED = ("row_samples", "column_samples", "row_count", "column_count", "row_chunks", "column_chunks")
# May be part of a larger tensor, at any place of it; they are read number by number.
UNALIGNED = ("row_starts", "row_lengths", "row_offsets", "column_starts", "column_lengths", "column_offsets")


@triton.jit
def _samples(starts, lengths, offsets, numbers, samples):
    """(whether there is such a sample, first token, tokens, first place in the block) of samples by their number."""
    exists = numbers < samples
    start = tl.load(starts + numbers, mask=exists, other=0)
    length = tl.load(lengths + numbers, mask=exists, other=1)
    return exists, start, length, tl.load(offsets + numbers, mask=exists, other=0)


@triton.jit
def _end(lengths, SLOT: tl.constexpr, LONG: tl.constexpr):
    """Where the chunks of a group's samples end. One chunk is no loop, which would carry what it finds through its products."""
    if LONG:
        return tl.max(lengths, 0)
    else:
        return SLOT


@triton.jit
def _products(
    row_tokens, rows, column_tokens, columns, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``[ROWS, COLUMNS]`` similarities of tokens, float32."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    row_pointers = row_tokens + rows.to(tl.int64)[:, None] * WIDTH
    column_pointers = column_tokens + columns.to(tl.int64)[:, None] * WIDTH
    for first in range(0, width, DEPTH):
        depth = first + tl.arange(0, DEPTH)[None, :]
        if WIDTH % DEPTH == 0:
            a, b = tl.load(row_pointers + depth), tl.load(column_pointers + depth)
        else:
            a = tl.load(row_pointers + depth, mask=depth < WIDTH, other=0.0)
            b = tl.load(column_pointers + depth, mask=depth < WIDTH, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    return total


@triton.jit
def _first_maximum(products, AXIS: tl.constexpr, PACKED: tl.constexpr):
    """The maximum along an axis of three and the first place that has it.

    ``PACKED``: the place takes the lowest bits of the product, so that one maximum finds both; what differs in these bits
    alone counts as equal.
    """
    LAST: tl.constexpr = products.shape[AXIS] - 1
    place = tl.arange(0, LAST + 1)
    if AXIS == 1:
        place = place[None, :, None]
    else:
        place = place[None, None, :]
    if PACKED:
        packed = tl.max((_in_order(products.to(tl.int32, bitcast=True)) & ~LAST) | (LAST - place), AXIS)
        best = _in_order(packed & ~LAST).to(tl.float32, bitcast=True)
        found = LAST - (packed & LAST)
    else:
        best = tl.max(products, AXIS)
        found = tl.min(tl.where(products == tl.expand_dims(best, AXIS), place, LAST), AXIS)
    return best, found


@triton.jit
def _in_order(bits):
    """Integers that order as the float32 of these bits do, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _later_maximum(
    best, found, products, chunk, GROUP: tl.constexpr, SLOT: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """``[GROUP, columns]`` maxima over the rows of each sample and their places, one chunk of rows further."""
    here, place = _first_maximum(tl.reshape(products, [GROUP, SLOT, products.shape[1]]), 1, PACKED)
    return tl.maximum(best, here), tl.where(here > best, chunk + place, found)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def mean_max_kernel(
    row_tokens, row_starts, row_lengths, row_offsets, column_tokens, column_starts, column_lengths, column_offsets,
    of_rows, of_columns, row_places, column_places, row_samples, column_samples, row_count, column_count, width,
    ROW_SLOT: tl.constexpr, ROW_GROUP: tl.constexpr, COLUMN_SLOT: tl.constexpr, COLUMN_GROUP: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, PACKED: tl.constexpr, LONG_ROWS: tl.constexpr, LONG_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Means of the maxima over rows and, where the samples of the columns fit into their slots, of those over columns."""
    ROWS: tl.constexpr = ROW_GROUP * ROW_SLOT
    COLUMNS: tl.constexpr = COLUMN_GROUP * COLUMN_SLOT
    row_groups = tl.cdiv(row_samples, ROW_GROUP)
    i0, j0 = tl.program_id(0) % row_groups * ROW_GROUP, tl.program_id(0) // row_groups * COLUMN_GROUP
    i, j = i0 + tl.arange(0, ROW_GROUP), j0 + tl.arange(0, COLUMN_GROUP)
    i_exists, _, i_length, _ = _samples(row_starts, row_lengths, row_offsets, i, row_samples)
    j_exists, _, j_length, _ = _samples(column_starts, column_lengths, column_offsets, j, column_samples)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    r_exists, r_start, r_length, r_offset = _samples(row_starts, row_lengths, row_offsets, i0 + row // ROW_SLOT, row_samples)
    c_exists, c_start, c_length, c_offset = _samples(
        column_starts, column_lengths, column_offsets, j0 + column // COLUMN_SLOT, column_samples
    )
    by_row = tl.zeros([ROW_GROUP, COLUMN_GROUP], tl.float32)
    by_column = tl.zeros([ROW_GROUP, COLUMN_GROUP], tl.float32)
    for column_chunk in range(0, _end(c_length, COLUMN_SLOT, LONG_COLUMNS), COLUMN_SLOT):
        c_place = column_chunk + column % COLUMN_SLOT
        columns = c_start + tl.minimum(c_place, c_length - 1)
        best, found = tl.full([ROW_GROUP, COLUMNS], NOTHING, tl.float32), tl.zeros([ROW_GROUP, COLUMNS], tl.int32)
        for chunk in range(0, _end(r_length, ROW_SLOT, LONG_ROWS), ROW_SLOT):
            r_place = chunk + row % ROW_SLOT
            rows = r_start + tl.minimum(r_place, r_length - 1)
            products = _products(row_tokens, rows, column_tokens, columns, width, ROWS, COLUMNS, WIDTH, DEPTH)
            best, found = _later_maximum(best, found, products, chunk, ROW_GROUP, ROW_SLOT, PACKED)
            if not LONG_COLUMNS:
                held = r_exists & (r_place < r_length)
                mine, place = _first_maximum(tl.reshape(products, [ROWS, COLUMN_GROUP, COLUMN_SLOT]), 2, PACKED)
                mine = tl.where(held[:, None], mine, 0.0)
                by_row += tl.sum(tl.reshape(mine, [ROW_GROUP, ROW_SLOT, COLUMN_GROUP]), 1)
                kept = row_places + j.to(tl.int64)[None, :] * row_count + (r_offset + r_place)[:, None]
                place = tl.minimum(place, j_length[None, :] - 1).to(row_places.dtype.element_ty)
                tl.store(kept, place, mask=held[:, None] & j_exists[None, :])
        held = c_exists & (c_place < c_length)
        best = tl.where(held[None, :], best, 0.0)
        by_column += tl.sum(tl.reshape(best, [ROW_GROUP, COLUMN_GROUP, COLUMN_SLOT]), 2)
        kept = column_places + i.to(tl.int64)[:, None] * column_count + (c_offset + c_place)[None, :]
        found = tl.minimum(found, i_length[:, None] - 1).to(column_places.dtype.element_ty)
        tl.store(kept, found, mask=i_exists[:, None] & held[None, :])
    met = i_exists[:, None] & j_exists[None, :]
    tl.store(of_columns + j.to(tl.int64)[None, :] * row_samples + i[:, None], by_column / j_length[None, :], mask=met)
    if not LONG_COLUMNS:
        tl.store(of_rows + i.to(tl.int64)[:, None] * column_samples + j[None, :], by_row / i_length[:, None], mask=met)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def largest_kernel(
    row_tokens, row_starts, row_lengths, row_offsets, column_tokens, column_starts, column_lengths, column_offsets,
    of_rows, row_places, column_places, row_samples, column_samples, width,
    ROW_SLOT: tl.constexpr, ROW_GROUP: tl.constexpr, COLUMN_SLOT: tl.constexpr, COLUMN_GROUP: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, PACKED: tl.constexpr, LONG_ROWS: tl.constexpr, LONG_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The largest product of any two tokens of two samples, and the first place of it: by the row, then by the column."""
    ROWS: tl.constexpr = ROW_GROUP * ROW_SLOT
    COLUMNS: tl.constexpr = COLUMN_GROUP * COLUMN_SLOT
    row_groups = tl.cdiv(row_samples, ROW_GROUP)
    i0, j0 = tl.program_id(0) % row_groups * ROW_GROUP, tl.program_id(0) // row_groups * COLUMN_GROUP
    i, j = i0 + tl.arange(0, ROW_GROUP), j0 + tl.arange(0, COLUMN_GROUP)
    i_exists, _, i_length, _ = _samples(row_starts, row_lengths, row_offsets, i, row_samples)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    _, r_start, r_length, _ = _samples(row_starts, row_lengths, row_offsets, i0 + row // ROW_SLOT, row_samples)
    _, c_start, c_length, _ = _samples(
        column_starts, column_lengths, column_offsets, j0 + column // COLUMN_SLOT, column_samples
    )
    largest = tl.full([ROW_GROUP, COLUMN_GROUP], NOTHING, tl.float32)
    first = tl.full([ROW_GROUP, COLUMN_GROUP], NO_PLACE, tl.int64)
    for column_chunk in range(0, _end(c_length, COLUMN_SLOT, LONG_COLUMNS), COLUMN_SLOT):
        c_place = tl.minimum(column_chunk + column % COLUMN_SLOT, c_length - 1)
        best, found = tl.full([ROW_GROUP, COLUMNS], NOTHING, tl.float32), tl.zeros([ROW_GROUP, COLUMNS], tl.int32)
        for chunk in range(0, _end(r_length, ROW_SLOT, LONG_ROWS), ROW_SLOT):
            rows = r_start + tl.minimum(chunk + row % ROW_SLOT, r_length - 1)
            products = _products(row_tokens, rows, column_tokens, c_start + c_place, width, ROWS, COLUMNS, WIDTH, DEPTH)
            best, found = _later_maximum(best, found, products, chunk, ROW_GROUP, ROW_SLOT, PACKED)
        pair = (tl.minimum(found, i_length[:, None] - 1).to(tl.int64) << PLACE_BITS) + c_place[None, :]
        best = tl.reshape(best, [ROW_GROUP, COLUMN_GROUP, COLUMN_SLOT])
        here = tl.max(best, 2)
        pair = tl.reshape(pair, [ROW_GROUP, COLUMN_GROUP, COLUMN_SLOT])
        pair = tl.min(tl.where(best == here[:, :, None], pair, NO_PLACE), 2)
        first = tl.where((here > largest) | ((here == largest) & (pair < first)), pair, first)
        largest = tl.maximum(largest, here)
    met = i_exists[:, None] & (j < column_samples)[None, :]
    kept = i.to(tl.int64)[:, None] * column_samples + j[None, :]
    tl.store(of_rows + kept, largest, mask=met)
    tl.store(row_places + kept, (first >> PLACE_BITS).to(row_places.dtype.element_ty), mask=met)
    tl.store(column_places + kept, first.to(tl.int32).to(column_places.dtype.element_ty), mask=met)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def gradient_kernel(
    gradient, row_starts, row_lengths, row_offsets, column_tokens, column_starts, column_lengths, column_offsets,
    by_rows, by_columns, row_places, column_places, row_samples, column_samples, row_count, column_count, row_chunks,
    column_chunks,
    ROW_SLOT: tl.constexpr, ROW_GROUP: tl.constexpr, COLUMN_SLOT: tl.constexpr, COLUMN_GROUP: tl.constexpr,
    WIDTH: tl.constexpr, SLICE: tl.constexpr, UNIT: tl.constexpr, ANY_TWO: tl.constexpr,
):  # fmt: skip
    """Add to the rows' gradients the tokens that they chose and those that chose them, each by its weight.

    The weights of a tile are a matrix, so that a sum has one writer and one order. A program has a slice of the width.
    """
    ROWS: tl.constexpr = ROW_GROUP * ROW_SLOT
    COLUMNS: tl.constexpr = COLUMN_GROUP * COLUMN_SLOT
    SLICES: tl.constexpr = (WIDTH + SLICE - 1) // SLICE
    depth = tl.program_id(0) % SLICES * SLICE + tl.arange(0, SLICE)
    part = tl.program_id(0) // SLICES
    i0, row_chunk = part // row_chunks * ROW_GROUP, part % row_chunks * ROW_SLOT
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    r, i = i0 + row // ROW_SLOT, i0 + tl.arange(0, ROW_GROUP)
    r_exists, r_start, r_length, r_offset = _samples(row_starts, row_lengths, row_offsets, r, row_samples)
    r_place = row_chunk + row % ROW_SLOT
    held = r_exists & (r_place < r_length)
    slot_place = row_chunk + tl.arange(0, ROW_SLOT)
    total = tl.zeros([ROWS, SLICE], tl.float32)
    for step in range(0, tl.cdiv(column_samples, COLUMN_GROUP) * column_chunks):
        j0, column_chunk = step // column_chunks * COLUMN_GROUP, step % column_chunks * COLUMN_SLOT
        j, c = j0 + tl.arange(0, COLUMN_GROUP), j0 + column // COLUMN_SLOT
        c_exists, c_start, c_length, c_offset = _samples(column_starts, column_lengths, column_offsets, c, column_samples)
        c_place = column_chunk + column % COLUMN_SLOT
        met = held[:, None] & (j < column_samples)[None, :]
        pair = r.to(tl.int64)[:, None] * column_samples + j[None, :]
        weight = tl.load(by_rows + pair, mask=met, other=0.0)
        if ANY_TWO:
            mine = tl.load(row_places + pair, mask=met, other=0).to(tl.int32)
            weight = tl.where(mine == r_place[:, None], weight, 0.0)
            chosen = tl.load(column_places + pair, mask=met, other=0).to(tl.int32)
        else:
            weight = weight / r_length[:, None]
            kept = row_places + j.to(tl.int64)[None, :] * row_count + (r_offset + r_place)[:, None]
            chosen = tl.load(kept, mask=met, other=0).to(tl.int32)
        place = column_chunk + tl.arange(0, COLUMN_SLOT)
        weights = tl.where(chosen[:, :, None] == place[None, None, :], weight[:, :, None], 0.0)
        weights = tl.reshape(weights, [ROWS, COLUMNS])
        if not ANY_TWO:
            met = (i < row_samples)[:, None] & (c_exists & (c_place < c_length))[None, :]
            pair = c.to(tl.int64)[None, :] * row_samples + i[:, None]
            weight = tl.load(by_columns + pair, mask=met, other=0.0) / c_length[None, :]
            kept = column_places + i.to(tl.int64)[:, None] * column_count + (c_offset + c_place)[None, :]
            chosen = tl.load(kept, mask=met, other=0).to(tl.int32)
            sent = tl.where(chosen[:, None, :] == slot_place[None, :, None], weight[:, None, :], 0.0)
            weights += tl.reshape(sent, [ROWS, COLUMNS])
        columns = (c_start + tl.minimum(c_place, c_length - 1)).to(tl.int64)
        tokens = tl.load(column_tokens + columns[:, None] * WIDTH + depth[None, :], mask=(depth < WIDTH)[None, :], other=0.0)
        total = tl.dot((weights * UNIT).to(tokens.dtype), tokens, total, input_precision="ieee")
    pointers = gradient + (r_start + r_place).to(tl.int64)[:, None] * WIDTH + depth[None, :]
    written = held[:, None] & (depth < WIDTH)[None, :]
    tl.store(pointers, tl.load(pointers, mask=written, other=0.0) + total * (1.0 / UNIT), mask=written)
