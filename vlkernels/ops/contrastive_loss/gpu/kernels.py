"""impl "triton" on the device: normalisers of rows and columns in one visit of all logits, and the weights of a wave of pairs.

The largest logit of a row must meet itself again to the last bit: that a trained model's loss and gradients are small
differences of large numbers is why products and differences are not contracted here (see ``EXACT`` of the launches).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core.triton_math import LOG2_E
from vlkernels.core.triton_similarity import similarity_tile, store_weights, tile_of_wave

NOTHING = tl.constexpr(-1e30)  # the logit of no pair: finite, so that nothing less nothing is 0
FIELDS = tl.constexpr(4)  # largest logit, sum of exponentials relative to it, positive logit, excess: see MATH.md

# Numbers that differ between batches of one model: specialising on them would compile a variant for each.
UNSPECIALIZED = ("rows", "columns", "partner", "tiles_down", "tiles_across", "strips")
# Where a wave begins, and how far apart its rows of weights are, are multiples of 64 in every call, which makes stores wide.
UNSPECIALIZED_WEIGHTS = ("rows", "columns", "partner", "end_row", "end_column")
# A label is eight bytes, and rows of labels and statistics may begin anywhere.
UNALIGNED = ("row_labels", "column_labels", "shares", "row_largest", "row_factor", "column_largest", "column_factor")


@triton.jit
def join(largest, total, other_largest, other_total):
    """(largest, total) of two sets of logits as those of one."""
    both = tl.maximum(largest, other_largest)
    return both, total * tl.exp2((largest - both) * LOG2_E) + other_total * tl.exp2((other_largest - both) * LOG2_E)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def statistics_kernel(
    x_base, y_base, scale_base, row_labels, column_labels, row_parts, column_parts,
    x_stride, y_stride, rows, columns, partner, tiles_down, tiles_across, strips,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    LABELS: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Statistics of the rows of a split within a strip of columns and, ``BY_COLUMN``, of those columns within the split.

    Row statistics live in registers along a strip; those of a column in the program's own part, which it reads and writes once
    per tile of rows. The partner of row i is column i + ``partner``. Parts are [FIELDS, rows] and [FIELDS, columns].
    """
    split, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    scale = tl.load(scale_base)
    row_part = row_parts + strip.to(tl.int64) * FIELDS * rows
    first_tile = split * tiles_down
    for down in range(first_tile, tl.minimum(first_tile + tiles_down, tl.cdiv(rows, ROWS))):
        first_row = down * ROWS
        row = first_row + tl.arange(0, ROWS)
        largest, total = tl.full([ROWS], NOTHING, tl.float32), tl.zeros([ROWS], tl.float32)
        positive, excess = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        for across in range(strip * tiles_across, tl.minimum((strip + 1) * tiles_across, tl.cdiv(columns, COLUMNS))):
            first_column = across * COLUMNS
            column = first_column + tl.arange(0, COLUMNS)
            logits = scale * similarity_tile(
                x_base, y_base, first_row, first_column, rows, columns, x_stride, y_stride, ROWS, COLUMNS, DEPTH, WIDTH
            )
            if LABELS:
                row_label = tl.load(row_labels + row, mask=row < rows, other=0)
                column_label = tl.load(column_labels + column, mask=column < columns, other=0)
                positives = tl.where(row_label[:, None] == column_label[None, :], logits, 0.0)  # 0 past the ends
                positive += tl.sum(positives, 1)
            elif (first_row + partner < first_column + COLUMNS) & (first_column < first_row + partner + ROWS):
                positive += tl.sum(tl.where((row + partner)[:, None] == column[None, :], logits, 0.0), 1)
            logits = tl.where((row < rows)[:, None] & (column < columns)[None, :], logits, NOTHING)
            before, tile_largest = largest, tl.max(logits, 1)
            largest = tl.maximum(largest, tile_largest)
            keep = tl.exp2((before - largest) * LOG2_E)
            below = logits - largest[:, None]
            exponentials = tl.exp2(below * LOG2_E)
            if not BY_COLUMN:
                excess = keep * (excess + (before - largest) * total) + tl.sum(exponentials * below, 1)
            total = keep * total + tl.sum(exponentials, 1)
            if BY_COLUMN:
                tile_largest = tl.max(logits, 0)
                tile_total = tl.sum(tl.exp2((logits - tile_largest[None, :]) * LOG2_E), 0)
                place = column_parts + split.to(tl.int64) * FIELDS * columns + column
                inside, seen = column < columns, (column < columns) & (down > first_tile)
                seen_largest = tl.load(place, mask=seen, other=NOTHING)
                seen_total = tl.load(place + columns, mask=seen, other=0.0)
                tile_largest, tile_total = join(seen_largest, seen_total, tile_largest, tile_total)
                tl.store(place, tile_largest, mask=inside)
                tl.store(place + columns, tile_total, mask=inside)
                if LABELS:
                    place += 2 * columns
                    tl.store(place, tl.load(place, mask=seen, other=0.0) + tl.sum(positives, 0), mask=inside)
        place = row_part + row
        tl.store(place, largest, mask=row < rows)
        tl.store(place + rows, total, mask=row < rows)
        tl.store(place + 2 * rows, positive, mask=row < rows)
        tl.store(place + 3 * rows, excess, mask=row < rows)
        tl.debug_barrier()  # the next tile of rows reads what other threads wrote for these columns


@triton.jit(do_not_specialize=UNSPECIALIZED_WEIGHTS, do_not_specialize_on_alignment=UNALIGNED)
def weights_kernel(
    x_base, y_base, scale_base, row_largest, row_factor, column_largest, column_factor, row_labels, column_labels, shares,
    weights_base, alignments, x_stride, y_stride, weights_stride, rows, columns, partner,
    first_row, first_column, end_row, end_column, hard, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    LABELS: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """The weights of a tile: exponentials of rows or, ``BY_COLUMN``, softmax of rows + softmax of columns - ``hard`` targets.

    Adds the sum of weights times similarities, not yet rounded, to the program's own place in ``alignments``.
    """
    row_start, column_start = tile_of_wave(tl.program_id(0), first_row, first_column, end_column, ROWS, COLUMNS)
    row, column = row_start + tl.arange(0, ROWS), column_start + tl.arange(0, COLUMNS)
    in_row, in_column = row < rows, column < columns
    sums = similarity_tile(
        x_base, y_base, row_start, column_start, rows, columns, x_stride, y_stride, ROWS, COLUMNS, DEPTH, WIDTH
    )
    logits = sums * tl.load(scale_base)
    largest = tl.load(row_largest + row, mask=in_row, other=0.0)
    weights = tl.exp2((logits - largest[:, None]) * LOG2_E)
    if BY_COLUMN:
        weights *= tl.load(row_factor + row, mask=in_row, other=0.0)[:, None]
        largest = tl.load(column_largest + column, mask=in_column, other=0.0)
        share = tl.load(column_factor + column, mask=in_column, other=0.0)
        weights += tl.exp2((logits - largest[None, :]) * LOG2_E) * share[None, :]
        if LABELS:
            of_row = tl.load(row_labels + row, mask=in_row, other=0)
            of_column = tl.load(column_labels + column, mask=in_column, other=0)
            wanted = hard * tl.load(shares + column, mask=in_column, other=0.0)
            weights -= tl.where(of_row[:, None] == of_column[None, :], wanted[None, :], 0.0)
        else:
            weights -= tl.where(row[:, None] + partner == column[None, :], hard, 0.0)
    if alignments is not None:
        aligned = tl.where(in_row[:, None] & in_column[None, :], weights * sums, 0.0)
        place = alignments + tl.program_id(0)
        tl.store(place, tl.load(place) + tl.sum(aligned))
    store_weights(
        weights_base, weights_stride, weights * factor, row_start, column_start, first_row, first_column, end_row, end_column,
        ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED_WEIGHTS, do_not_specialize_on_alignment=UNALIGNED)
def targets_kernel(
    row_labels, column_labels, shares, weights_base, weights_stride, rows, columns,
    first_row, first_column, end_row, end_column, factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The hard targets of a tile as weights: keys with the label of the query, in equal shares."""
    row_start, column_start = tile_of_wave(tl.program_id(0), first_row, first_column, end_column, ROWS, COLUMNS)
    row, column = row_start + tl.arange(0, ROWS), column_start + tl.arange(0, COLUMNS)
    of_row = tl.load(row_labels + row, mask=row < rows, other=0)
    of_column = tl.load(column_labels + column, mask=column < columns, other=0)
    share = tl.load(shares + column, mask=column < columns, other=0.0) * factor
    weights = tl.where(of_row[:, None] == of_column[None, :], share[None, :], 0.0)
    store_weights(
        weights_base, weights_stride, weights, row_start, column_start, first_row, first_column, end_row, end_column,
        ROWS, COLUMNS,
    )  # fmt: skip
