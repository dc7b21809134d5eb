"""The Triton kernels of the draw: the log-sum-exp of every block of keys, and the key of a block that a number chooses."""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import triton_math
from vlkernels.core.triton_similarity import similarity_tile

NOTHING = tl.constexpr(-float("inf"))

# Numbers that differ between calls of one model: specialising on them would compile a variant for each.
UNSPECIALIZED = ("rows", "keys", "first")
# May be part of a larger tensor, at any place of it; they are read number by number.
UNALIGNED = ("labels", "scale")


@triton.jit
def _admissible(row, key, labels, rows, keys, first):
    """bool [R, C]: keys [C] that are negatives of the queries [R], which are rows ``first ..`` of the concatenated batch."""
    allowed = (key[None, :] < keys) & (key[None, :] != first + row[:, None])
    if labels is not None:
        own = tl.load(labels + first + row, mask=row < rows, other=0)
        others = tl.load(labels + key, mask=key < keys, other=0)
        allowed = allowed & (own[:, None] != others[None, :])
    return allowed


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def block_kernel(
    query_base, key_base, labels, scale, block_lse, query_stride, key_stride, rows, keys, first,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of the admissible logits of a block of keys, for a tile of queries; -inf where there is none."""
    blocks = tl.cdiv(keys, BLOCK)
    i, j = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    products = similarity_tile(
        query_base, key_base, i * ROWS, j * BLOCK, rows, keys, query_stride, key_stride, ROWS, BLOCK, DEPTH, WIDTH
    )
    row, key = i * ROWS + tl.arange(0, ROWS), j * BLOCK + tl.arange(0, BLOCK)
    logits = products * (tl.load(scale).to(tl.float32) * triton_math.LOG2_E)
    logits = tl.where(_admissible(row, key, labels, rows, keys, first), logits, NOTHING)
    highest = tl.max(logits, 1)
    highest = tl.where(highest == NOTHING, 0.0, highest)
    total = tl.sum(tl.exp2(logits - highest[:, None]), 1)
    lse = tl.where(total == 0.0, NOTHING, (highest + tl.log2(total)) * triton_math.LN_2)
    tl.store(block_lse + row.to(tl.int64) * blocks + j, lse, mask=row < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def choose_kernel(
    query_base, key_base, labels, scale, drawn_blocks, drawn_lse, thresholds, chosen, query_stride, key_stride, rows, keys, first,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The first key of a query's block whose cumulative share of the block exceeds the threshold; else its last one.

    A scan adds in an order of its own, so only keys that have a weight are looked at: none that is not admissible is taken.
    """
    number = tl.program_id(0)
    row, block = number + tl.arange(0, 1), tl.load(drawn_blocks + number).to(tl.int32)
    place = tl.arange(0, BLOCK)
    key = block * BLOCK + place
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        query = tl.load(query_base + number.to(tl.int64) * query_stride + depth, mask=depth < WIDTH, other=0.0)
        inside = (key < keys)[:, None] & (depth < WIDTH)[None, :]
        values = tl.load(key_base + key.to(tl.int64)[:, None] * key_stride + depth[None, :], mask=inside, other=0.0)
        products += tl.sum(values.to(tl.float32) * query.to(tl.float32)[None, :], 1)
    logits = products * tl.load(scale).to(tl.float32) - tl.load(drawn_lse + number)
    allowed = tl.sum(_admissible(row, key, labels, rows, keys, first).to(tl.int32), 0) > 0
    shares = tl.where(allowed, tl.exp2(logits * triton_math.LOG2_E), 0.0)
    beyond = (tl.cumsum(shares, 0) > tl.load(thresholds + number)) & (shares > 0.0)
    found = tl.min(tl.where(beyond, place, BLOCK), 0)
    last = tl.max(tl.where(shares > 0.0, place, 0), 0)
    tl.store(chosen + number, block * BLOCK + tl.minimum(found, last))
