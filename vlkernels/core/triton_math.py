"""What Triton kernels of several ops share: the random draw of ``core.random`` and a softmax in powers of two."""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import random, triton_runtime

ROUNDS = tl.constexpr(random.ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(word) for word in random.MULTIPLIERS)
WEYL_0, WEYL_1 = (tl.constexpr(word) for word in random.WEYL)
COLUMNS_PER_CALL = tl.constexpr(random.COLUMNS_PER_CALL)
MAX_STREAMS = tl.constexpr(random.MAX_STREAMS)

LOG2_E, LN_2 = tl.constexpr(triton_runtime.LOG2_E), tl.constexpr(triton_runtime.LN_2)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32 on uint32 words of any shapes that broadcast."""
    for _ in tl.static_range(ROUNDS):
        high0, low0 = tl.umulhi(c0, MULTIPLIER_0), c0 * MULTIPLIER_0
        high1, low1 = tl.umulhi(c2, MULTIPLIER_1), c2 * MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += WEYL_0
        k1 += WEYL_1
    return c0, c1, c2, c3


@triton.jit
def draw_key(state):
    """The two words every draw of this step is keyed by, from ``Rng``'s [seed, step]."""
    seed, step = tl.load(state).to(tl.uint64), tl.load(state + 1).to(tl.uint64)
    zero = (seed * 0).to(tl.uint32)
    seed_high, step_high = (seed >> 32).to(tl.uint32), (step >> 32).to(tl.uint32)
    key0, key1, _, _ = philox(seed.to(tl.uint32), seed_high, step.to(tl.uint32), step_high, zero, zero)
    return key0, key1


@triton.jit
def keep_block(
    key0, key1, stream, head, sample, position, first_column, threshold, COLUMNS: tl.constexpr, BY_COLUMN: tl.constexpr
):  # fmt: skip
    """bool: what dropout keeps of columns ``first_column ..`` of the rows ``position``, one draw for sixteen columns.

    ``[rows, COLUMNS]``, or ``[COLUMNS, rows]`` with ``BY_COLUMN``; ``first_column`` is a multiple of sixteen.
    """
    groups = (first_column // COLUMNS_PER_CALL + tl.arange(0, COLUMNS // COLUMNS_PER_CALL)).to(tl.uint32)
    rows = position.to(tl.uint32)
    lane = tl.arange(0, COLUMNS_PER_CALL)
    last_word = (stream * MAX_STREAMS + head).to(tl.uint32)
    if BY_COLUMN:
        w0, w1, w2, w3 = philox(groups[:, None], rows[None, :], sample.to(tl.uint32), last_word, key0, key1)
        word, shift = (lane // 4)[None, :, None], (lane % 4 * 8).to(tl.uint32)[None, :, None]
        low, high = tl.where(word == 0, w0[:, None, :], w1[:, None, :]), tl.where(word == 2, w2[:, None, :], w3[:, None, :])
    else:
        w0, w1, w2, w3 = philox(groups[None, :], rows[:, None], sample.to(tl.uint32), last_word, key0, key1)
        word, shift = (lane // 4)[None, None, :], (lane % 4 * 8).to(tl.uint32)[None, None, :]
        low, high = tl.where(word == 0, w0[:, :, None], w1[:, :, None]), tl.where(word == 2, w2[:, :, None], w3[:, :, None])
    kept = ((tl.where(word < 2, low, high) >> shift) & 0xFF) >= threshold
    if BY_COLUMN:
        block = tl.reshape(kept, [COLUMNS, position.shape[0]])
    else:
        block = tl.reshape(kept, [position.shape[0], COLUMNS])
    return block


@triton.jit
def online_softmax(scores, highest, total, scale, HIDDEN: tl.constexpr):
    """One step of a softmax over tiles of columns: (exponentials, factor for what was summed before, highest, total).

    ``scores`` are unscaled; ``scale`` is positive and holds log2 e; ``highest`` counts in powers of two. ``HIDDEN``: some
    scores are -inf, so that a row may have seen nothing yet.
    """
    new = tl.maximum(highest, tl.max(scores, 1) * scale)
    if HIDDEN:
        origin = tl.where(new == -float("inf"), 0.0, new)
    else:
        origin = new
    exponentials = tl.exp2(scores * scale - origin[:, None])
    factor = tl.exp2(highest - origin)
    return exponentials, factor, new, total * factor + tl.sum(exponentials, 1)
