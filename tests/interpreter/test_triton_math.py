"""The shared Triton math against core.random, bit for bit, and a softmax over tiles against PyTorch's."""

import pytest
import torch
import triton
import triton.language as tl

import vlkernels as vk
from vlkernels.core import random, triton_math, triton_runtime


@triton.jit
def draw_kernel(state, sample_ids, positions, kept, stream, head, first_column, threshold,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_COLUMN: tl.constexpr):  # fmt: skip
    key0, key1 = triton_math.draw_key(state)
    position = tl.load(positions + tl.arange(0, ROWS))
    sample = tl.load(sample_ids + tl.program_id(0))
    found = triton_math.keep_block(key0, key1, stream, head, sample, position, first_column, threshold, COLUMNS, BY_COLUMN)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if BY_COLUMN:
        place = row[None, :] * COLUMNS + column[:, None]
    else:
        place = row[:, None] * COLUMNS + column[None, :]
    tl.store(kept + tl.program_id(0) * ROWS * COLUMNS + place, found)


@pytest.mark.parametrize("by_column", (False, True))
@pytest.mark.parametrize(
    "seed, step, stream, head, first", ((1234, 0, 0, 0, 0), (-5, 7, 65535, 63, 48), (2**61 + 11, 2**33, 7, 2, 1600))
)
def test_the_draw_is_that_of_core_random(by_column, seed, step, stream, head, first):
    rng = vk.Rng(seed)
    rng.advance(step)
    rows, columns, p = 32, 64, 0.3
    samples = torch.tensor([3, 2**31 - 1], dtype=torch.int32)
    positions = torch.randint(0, 100_000, (rows,), dtype=torch.int32)
    kept = torch.empty(2, rows, columns, dtype=torch.bool)
    threshold = random.dropout_threshold(p)
    draw_kernel[(2,)](rng.state, samples, positions, kept, stream, head, first, threshold, rows, columns, by_column)
    wanted = random.keep_mask(
        rng.state, stream, samples[:, None, None], positions[:, None], first + torch.arange(columns), p, head
    )
    assert torch.equal(kept, wanted) and 0.6 < kept.float().mean() < 0.8


@triton.jit
def softmax_kernel(scores, result, lse, scale, columns, ROWS: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, TILE)
    highest, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    for start in range(0, columns, TILE):
        tile = tl.load(scores + row[:, None] * columns + start + column[None, :])
        parts, factor, highest, total = triton_math.online_softmax(tile, highest, total, scale, HIDDEN)
        summed = summed * factor + tl.sum(parts * (start + column)[None, :].to(tl.float32), 1)
    tl.store(result + row, summed / total)
    tl.store(lse + row, (highest + tl.log2(total)) * triton_math.LN_2)


@pytest.mark.parametrize("hidden", (False, True))
def test_softmax_over_tiles(hidden):
    scores = 20 * torch.randn(16, 96)
    if hidden:
        scores[:8, :64] = -torch.inf  # rows that see nothing in their first tiles
    result, lse = torch.empty(16), torch.empty(16)
    softmax_kernel[(1,)](scores, result, lse, 0.25 * triton_runtime.LOG2_E, 96, 16, 32, hidden)
    exact = 0.25 * scores.double()
    torch.testing.assert_close(lse, exact.logsumexp(1).float())
    torch.testing.assert_close(result, (exact.softmax(1) @ torch.arange(96.0, dtype=torch.float64)).float())
