"""Linear cross-entropy in Triton: statistics of rows over splits of the vocabulary, losses, and slopes of a wave of logits.

Rows are those that count, one after the other: how many is on the device (``count``), the host knows a bound (``rows``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import triton_math
from vlkernels.core.triton_similarity import similarity_tile, store_weights, tile_of_wave

NOTHING = tl.constexpr(-float("inf"))
LOG2_E, LN_2 = triton_math.LOG2_E, triton_math.LN_2

# What a split of the vocabulary knows of a row, and what is known of it in the end; the last ones with a teacher alone.
HIGHEST, TOTAL, AT_TARGET, SUM, SOFT_TOTAL, TAUGHT_HIGHEST, TAUGHT_TOTAL, CROSS = (tl.constexpr(n) for n in range(8))
FIELDS, TAUGHT_FIELDS = 4, 8
END_HIGHEST, END_TOTAL, END_SOFT, END_TAUGHT_HIGHEST, END_TAUGHT = (tl.constexpr(n) for n in range(5))
ENDS, TAUGHT_ENDS = 2, 5

# Data: no number of these makes another kernel.
SIZES = ["rows", "entries"]
OPTIONS = ["label_smoothing", "z_loss", "distillation", "temperature"]
WAVE = ["first_row", "first_column", "end_row", "end_column"]


@triton.jit
def logits_tile(
    hidden, weight, bias, row, column, count, entries, hidden_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, COLUMNS] from (row, column) on; -inf past the last entry."""
    logits = similarity_tile(
        hidden, weight, row, column, count, entries, hidden_stride, weight_stride, ROWS, COLUMNS, DEPTH, WIDTH
    )  # fmt: skip
    columns = column + tl.arange(0, COLUMNS)
    if bias is not None:
        logits += tl.load(bias + columns, mask=columns < entries, other=0.0).to(tl.float32)[None, :]
    return tl.where((columns < entries)[None, :], logits, NOTHING)


@triton.jit
def exponentials(logits, highest, scale):
    """``2^(scale (logits - highest))``; 0 where a row has seen nothing but -inf. The difference is taken first: it is exact
    where the exponential matters, however large the logits."""
    origin = tl.where(highest == NOTHING, 0.0, highest)
    return tl.exp2((logits - origin[:, None]) * scale)


@triton.jit
def rescale(before, after, scale):
    """What a sum of exponentials from ``before`` is multiplied by to be one from ``after``."""
    return tl.where(before == NOTHING, 0.0, tl.exp2((before - after) * scale))


@triton.jit(do_not_specialize=[*SIZES, "split_entries", "temperature"])
def statistics_kernel(
    hidden, weight, bias, targets, teacher_hidden, teacher_weight, teacher_bias, count, statistics,
    hidden_stride, weight_stride, teacher_hidden_stride, teacher_weight_stride, rows, entries, split_entries, temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    TEACHER_DEPTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """What one split of the vocabulary knows of a tile of rows: ``statistics`` [fields, splits, rows]."""
    row, split, alive = tl.program_id(0) * ROWS, tl.program_id(1), tl.load(count)
    if row >= alive:
        return
    own = row + tl.arange(0, ROWS)
    target = tl.load(targets + own, mask=own < alive, other=0)
    softly = LOG2_E / temperature
    highest, total = tl.full([ROWS], NOTHING, tl.float32), tl.zeros([ROWS], tl.float32)
    at_target, logit_sum = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    soft_total, taught_highest = tl.zeros([ROWS], tl.float32), tl.full([ROWS], NOTHING, tl.float32)
    taught_total, cross = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(split * split_entries, tl.minimum((split + 1) * split_entries, entries), COLUMNS):
        column = start  # a tensor in the interpreter too, where the counter of a loop is an int
        columns = (column + tl.arange(0, COLUMNS))[None, :]
        logits = logits_tile(
            hidden, weight, bias, row, column, alive, entries, hidden_stride, weight_stride, ROWS, COLUMNS, DEPTH, WIDTH
        )  # fmt: skip
        at_target += tl.sum(tl.where(columns == target[:, None], logits, 0.0), 1)
        if SMOOTHED:
            logit_sum += tl.sum(tl.where(columns < entries, logits, 0.0), 1)
        new = tl.maximum(highest, tl.max(logits, 1))
        total = total * rescale(highest, new, LOG2_E) + tl.sum(exponentials(logits, new, LOG2_E), 1)
        if teacher_hidden is not None:
            soft_total = soft_total * rescale(highest, new, softly) + tl.sum(exponentials(logits, new, softly), 1)
            taught = logits_tile(
                teacher_hidden, teacher_weight, teacher_bias, row, column, alive, entries, teacher_hidden_stride,
                teacher_weight_stride, ROWS, COLUMNS, TEACHER_DEPTH, TEACHER_WIDTH,
            )  # fmt: skip
            taught_new = tl.maximum(taught_highest, tl.max(taught, 1))
            factor, goals = rescale(taught_highest, taught_new, softly), exponentials(taught, taught_new, softly)
            taught_total = taught_total * factor + tl.sum(goals, 1)
            cross = cross * factor + tl.sum(goals * tl.where(columns < entries, logits, 0.0), 1)
            taught_highest = taught_new
        highest = new
    splits = tl.num_programs(1)
    base, field = statistics + split * rows + own, splits * rows
    tl.store(base + HIGHEST * field, highest, mask=own < alive)
    tl.store(base + TOTAL * field, total, mask=own < alive)
    tl.store(base + AT_TARGET * field, at_target, mask=own < alive)
    tl.store(base + SUM * field, logit_sum, mask=own < alive)
    if teacher_hidden is not None:
        tl.store(base + SOFT_TOTAL * field, soft_total, mask=own < alive)
        tl.store(base + TAUGHT_HIGHEST * field, taught_highest, mask=own < alive)
        tl.store(base + TAUGHT_TOTAL * field, taught_total, mask=own < alive)
        tl.store(base + CROSS * field, cross, mask=own < alive)


@triton.jit(do_not_specialize=[*SIZES, "splits", *OPTIONS])
def losses_kernel(
    statistics, count, losses, ends, rows, entries, splits, label_smoothing, z_loss, distillation, temperature,
    ROWS: tl.constexpr, TAUGHT: tl.constexpr,
):  # fmt: skip
    """Losses of a tile of rows, 0 past the last one that counts, and ``ends`` [., rows], which its slopes are made from."""
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = own < tl.load(count)
    softly = LOG2_E / temperature
    field, base = splits * rows, statistics + own
    highest, taught_highest = tl.full([ROWS], NOTHING, tl.float32), tl.full([ROWS], NOTHING, tl.float32)
    for split in range(0, splits):
        highest = tl.maximum(highest, tl.load(base + HIGHEST * field + split * rows, mask=alive, other=0.0))
        if TAUGHT:
            found = tl.load(base + TAUGHT_HIGHEST * field + split * rows, mask=alive, other=0.0)
            taught_highest = tl.maximum(taught_highest, found)
    total, at_target, logit_sum = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    soft_total, taught_total, cross = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for split in range(0, splits):
        place = base + split * rows
        before = tl.load(place + HIGHEST * field, mask=alive, other=0.0)
        total += tl.load(place + TOTAL * field, mask=alive, other=1.0) * rescale(before, highest, LOG2_E)
        at_target += tl.load(place + AT_TARGET * field, mask=alive, other=0.0)
        logit_sum += tl.load(place + SUM * field, mask=alive, other=0.0)
        if TAUGHT:
            soft_total += tl.load(place + SOFT_TOTAL * field, mask=alive, other=1.0) * rescale(before, highest, softly)
            factor = rescale(tl.load(place + TAUGHT_HIGHEST * field, mask=alive, other=0.0), taught_highest, softly)
            taught_total += tl.load(place + TAUGHT_TOTAL * field, mask=alive, other=1.0) * factor
            cross += tl.load(place + CROSS * field, mask=alive, other=0.0) * factor
    log_total = tl.log2(total)
    tl.store(ends + END_HIGHEST * rows + own, highest, mask=alive)
    tl.store(ends + END_TOTAL * rows + own, log_total, mask=alive)
    # From the highest logit: a row that knows its target is a small number, not a difference of large ones.
    to_target, to_mean = highest - at_target, highest - logit_sum / entries
    found = (1 - label_smoothing) * to_target + label_smoothing * to_mean + log_total * LN_2
    if TAUGHT:
        soft_log, taught_log = tl.log2(soft_total), tl.log2(taught_total)
        softened = (highest - cross / taught_total) / temperature + soft_log * LN_2
        found = (1 - distillation) * found + distillation * temperature * temperature * softened
        tl.store(ends + END_SOFT * rows + own, soft_log, mask=alive)
        tl.store(ends + END_TAUGHT_HIGHEST * rows + own, taught_highest, mask=alive)
        tl.store(ends + END_TAUGHT * rows + own, taught_log, mask=alive)
    lse = highest + log_total * LN_2
    found += z_loss * lse * lse
    tl.store(losses + own, tl.where(alive, found, 0.0), mask=own < rows)


@triton.jit
def probabilities(logits, highest, log_total, scale):
    return tl.exp2((logits - highest[:, None]) * scale - log_total[:, None])


@triton.jit(do_not_specialize=[*SIZES, *OPTIONS, *WAVE])
def slopes_kernel(
    hidden, weight, bias, targets, teacher_hidden, teacher_weight, teacher_bias, count, ends, cotangents, slopes, bias_sums,
    hidden_stride, weight_stride, teacher_hidden_stride, teacher_weight_stride, slopes_stride, rows, entries,
    label_smoothing, z_loss, distillation, temperature, first_row, first_column, end_row, end_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    TEACHER_DEPTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """A tile of a wave of slopes, the derivatives by the logits, times ``FACTOR``; and sums of its columns for the bias."""
    row, column = tile_of_wave(tl.program_id(0), first_row, first_column, end_column, ROWS, COLUMNS)
    alive = tl.load(count)
    own, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    if row < alive:
        counts = own < alive
        highest = tl.load(ends + END_HIGHEST * rows + own, mask=counts, other=0.0)
        log_total = tl.load(ends + END_TOTAL * rows + own, mask=counts, other=0.0)
        target = tl.load(targets + own, mask=counts, other=0)
        logits = logits_tile(
            hidden, weight, bias, row, column, alive, entries, hidden_stride, weight_stride, ROWS, COLUMNS, DEPTH, WIDTH
        )  # fmt: skip
        hard = 1 - distillation
        of_lse = hard + 2 * z_loss * (highest + log_total * LN_2)
        found = probabilities(logits, highest, log_total, LOG2_E) * of_lse[:, None] - hard * label_smoothing / entries
        found -= tl.where(columns[None, :] == target[:, None], hard * (1 - label_smoothing), 0.0)
        if teacher_hidden is not None:
            softly = LOG2_E / temperature
            soft_log = tl.load(ends + END_SOFT * rows + own, mask=counts, other=0.0)
            found += distillation * temperature * probabilities(logits, highest, soft_log, softly)
            taught_highest = tl.load(ends + END_TAUGHT_HIGHEST * rows + own, mask=counts, other=0.0)
            taught_log = tl.load(ends + END_TAUGHT * rows + own, mask=counts, other=0.0)
            taught = logits_tile(
                teacher_hidden, teacher_weight, teacher_bias, row, column, alive, entries, teacher_hidden_stride,
                teacher_weight_stride, ROWS, COLUMNS, TEACHER_DEPTH, TEACHER_WIDTH,
            )  # fmt: skip
            found -= distillation * temperature * probabilities(taught, taught_highest, taught_log, softly)
        if cotangents is not None:
            found *= tl.load(cotangents + own, mask=counts, other=0.0)[:, None]
        found = tl.where(counts[:, None], found, 0.0)
    store_weights(
        slopes, slopes_stride, found * FACTOR, row, column, first_row, first_column, end_row, end_column, ROWS, COLUMNS
    )  # fmt: skip
    if bias_sums is not None:
        place = bias_sums + (row - first_row) // ROWS * entries + columns
        tl.store(place, tl.sum(found, 0), mask=columns < end_column)
