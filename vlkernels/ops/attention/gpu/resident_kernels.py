"""impl "triton" for short samples of one stream: a program holds whole samples of a head, so nothing is read or computed twice.

Every sample has a *slot* of ``SLOT`` rows and keys. ``GROUP`` samples share a program as a batch of small products (a leading
dimension of every tile), so none of them meets another one's values; a sample that has a program to itself has no such dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import layout, mask, triton_math

NONE, FULL = tl.constexpr(mask.NONE), tl.constexpr(mask.FULL)
MAX_SEGMENTS = tl.constexpr(layout.MAX_SEGMENTS)
NOTHING = tl.constexpr(-float("inf"))

# Numbers that differ between calls of one model: specialising on them would compile a variant for each.
UNSPECIALIZED = ("statistic_stride", "heads", "samples", "segments", "tokens", "stream", "threshold")
# May be part of a larger tensor, at any place of it; they are read number by number.
UNALIGNED = ("starts", "lengths", "table", "sample_ids")


@triton.jit
def _per_row(values, GROUP: tl.constexpr):
    """Numbers of the samples against rows."""
    if GROUP == 1:
        return values
    else:
        return values[:, None]


@triton.jit
def _slot_rows(first, SLOT: tl.constexpr, GROUP: tl.constexpr):
    return _per_row(first, GROUP) + tl.arange(0, SLOT)


@triton.jit
def _pointers(base, first, stride, SLOT: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    offsets = tl.arange(0, SLOT)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    start = first.to(tl.int64) * stride
    if GROUP == 1:
        return base + start + offsets
    else:
        return base + start[:, None, None] + offsets


@triton.jit
def _elements(rows, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """bool: the elements of some rows, without the padding of a head."""
    elements = tl.expand_dims(rows, -1)
    if HEAD_DIM < WIDTH:
        elements = elements & (tl.arange(0, WIDTH) < HEAD_DIM)[None, :]
    return elements


@triton.jit
def _load(base, first, stride, owned, SLOT: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The slots of samples that start at ``first``, zero where no row is ``owned``."""
    pointers = _pointers(base, first, stride, SLOT, GROUP, WIDTH)
    return tl.load(pointers, mask=_elements(owned, HEAD_DIM, WIDTH), other=0.0)


@triton.jit
def _store(
    base, values, first, stride, owned, SLOT: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    pointers = _pointers(base, first, stride, SLOT, GROUP, WIDTH)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=_elements(owned, HEAD_DIM, WIDTH))


@triton.jit
def _turned(x):
    if len(x.shape) == 2:
        return tl.trans(x)
    else:
        return tl.permute(x, (0, 2, 1))


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _samples(starts, lengths, tile, samples, segments, GROUP: tl.constexpr):
    """(number, whether there is such a sample, first row, end) of the samples of a program."""
    sample = tile * GROUP
    if GROUP > 1:
        sample += tl.arange(0, GROUP)
    exists = sample < samples
    first = tl.load(starts + sample * segments, mask=exists, other=0)
    last = sample * segments + segments - 1
    end = tl.load(starts + last, mask=exists, other=0) + tl.load(lengths + last, mask=exists, other=0)
    return sample, exists, first, end


@triton.jit
def _visible(starts, lengths, table, sample, exists, rows, segments, SLOT: tl.constexpr, GROUP: tl.constexpr):
    """bool ``[.., SLOT, SLOT]``: the table shows the key to the query.

    A query has two words with a bit for every segment: what it sees of keys up to its own place, and of keys after it.
    """
    before, after, own = tl.zeros(rows.shape, tl.int32), tl.zeros(rows.shape, tl.int32), tl.zeros(rows.shape, tl.int32)
    column = tl.arange(0, MAX_SEGMENTS)
    for segment in range(segments):
        begin = tl.load(starts + sample * segments + segment, mask=exists, other=0)
        end = begin + tl.load(lengths + sample * segments + segment, mask=exists, other=0)
        codes = tl.load(table + segment * segments + column, mask=column < segments, other=NONE)
        inside = (rows >= _per_row(begin, GROUP)) & (rows < _per_row(end, GROUP))
        before = tl.where(inside, tl.sum((codes != NONE).to(tl.int32) << column, 0), before)
        after = tl.where(inside, tl.sum((codes == FULL).to(tl.int32) << column, 0), after)
        own = tl.where(inside, 1 << segment, own)
    place = tl.arange(0, SLOT)
    seen = tl.where(place[None, :] <= place[:, None], tl.expand_dims(before, -1), tl.expand_dims(after, -1))
    return (seen & tl.expand_dims(own, -2)) != 0  # a row of nobody is no key: it has no bit


@triton.jit
def _kept(
    rng_state, stream, head, sample_ids, sample, exists, threshold, SLOT: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """bool ``[.., SLOT, SLOT]``: what dropout keeps. A slot begins with its sample, so its keys are whole draws."""
    key0, key1 = triton_math.draw_key(rng_state)
    identity = tl.load(sample_ids + sample, mask=exists, other=0)
    position = tl.arange(0, GROUP * SLOT) % SLOT
    if GROUP > 1:
        identity = tl.broadcast_to(identity[:, None], [GROUP, SLOT]).reshape([GROUP * SLOT, 1])
    column = tl.zeros([1], tl.int32)
    kept = triton_math.keep_block(key0, key1, stream, head, identity, position, column, threshold, SLOT, False)
    if GROUP > 1:
        kept = kept.reshape([GROUP, SLOT, SLOT])
    return kept


@triton.jit
def _clear(
    base, statistics, first, stop, stride,
    SLOT: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the rows from ``first`` on before ``stop``, which belong to nobody: zero, and -inf in ``statistics`` if given."""
    if GROUP == 1:
        most = stop - first
        zeros = tl.zeros([SLOT, WIDTH], tl.float32)
    else:
        most = tl.max(stop - first, 0)
        zeros = tl.zeros([GROUP, SLOT, WIDTH], tl.float32)
    for offset in range(0, most, SLOT):
        rows = _slot_rows(first + offset, SLOT, GROUP)
        theirs = rows < _per_row(stop, GROUP)
        _store(base, zeros, first + offset, stride, theirs, SLOT, GROUP, HEAD_DIM, WIDTH)
        if statistics is not None:
            tl.store(statistics + rows, tl.full(rows.shape, NOTHING, tl.float32), mask=theirs)


@triton.jit
def _nobodys(starts, lengths, sample, exists, end, tile, samples, segments, tokens, GROUP: tl.constexpr):
    """(where the gap behind each sample ends, first, end of a program's share of the rows past the last sample)."""
    follows = exists & (sample + 1 < samples)
    next_start = tl.load(starts + (sample + 1) * segments, mask=follows, other=0)
    last = samples * segments - 1
    past = tl.load(starts + last) + tl.load(lengths + last)
    programs = (samples + GROUP - 1) // GROUP
    share = (tokens - past + programs - 1) // programs
    first = past + tile * share
    return tl.where(follows, next_start, end), first, tl.minimum(first + share, tokens)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    q_base, k_base, v_base, out_base, lse_base, starts, lengths, table, sample_ids, rng_state,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head, statistic_stride,
    heads, samples, segments, tokens, scale, stream, threshold, keep_scale,
    SLOT: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """out and lse of ``GROUP`` samples and a head."""
    tile, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    sample, exists, first, end = _samples(starts, lengths, tile, samples, segments, GROUP)
    lse_base += head * statistic_stride
    out_base += head * out_head
    # First, because behind the products its addresses would lengthen the life of registers.
    gap_end, tail, tail_end = _nobodys(starts, lengths, sample, exists, end, tile, samples, segments, tokens, GROUP)
    _clear(out_base, lse_base, end, gap_end, out_stride, SLOT, GROUP, HEAD_DIM, WIDTH)
    _clear(out_base, lse_base, tail, tail_end, out_stride, SLOT, 1, HEAD_DIM, WIDTH)
    rows = _slot_rows(first, SLOT, GROUP)
    owned = rows < _per_row(end, GROUP)
    q = _load(q_base + head * q_head, first, q_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)
    k = _load(k_base + head * k_head, first, k_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)
    v = _load(v_base + head * v_head, first, v_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)
    scores = _product(q, _turned(k))
    visible = _visible(starts, lengths, table, sample, exists, rows, segments, SLOT, GROUP)
    scores = tl.where(visible, scores, NOTHING)
    highest = tl.max(scores, -1) * scale
    highest = tl.where(highest == NOTHING, 0.0, highest)
    p = tl.exp2(scores * scale - tl.expand_dims(highest, -1))
    total = tl.sum(p, -1)
    if DROPOUT:
        p = tl.where(_kept(rng_state, stream, head, sample_ids, sample, exists, threshold, SLOT, GROUP), p, 0.0)
    acc = _product(p.to(v.dtype), v)
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    lse = tl.where(blind, NOTHING, (highest + tl.log2(total)) * triton_math.LN_2)
    out = acc * tl.expand_dims(keep_scale / total, -1)
    tl.store(lse_base + rows, lse, mask=owned)
    _store(out_base, out, first, out_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def backward_kernel(
    q_base, k_base, v_base, do_base, lse_base, grad_lse_base, dq_base, dk_base, dv_base, starts, lengths, table, sample_ids,
    rng_state, q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head, dq_stride, dq_head, dk_stride, dk_head,
    dv_stride, dv_head, statistic_stride, heads, samples, segments, tokens, scale, softmax_scale, stream, threshold, keep_scale,
    SLOT: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, DROPOUT: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of ``GROUP`` samples and a head: five products. Delta comes from the probabilities, so out is not read."""
    tile, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    sample, exists, first, end = _samples(starts, lengths, tile, samples, segments, GROUP)
    dq_base += head * dq_head
    dk_base += head * dk_head
    dv_base += head * dv_head
    gap_end, tail, tail_end = _nobodys(starts, lengths, sample, exists, end, tile, samples, segments, tokens, GROUP)
    _clear(dq_base, None, end, gap_end, dq_stride, SLOT, GROUP, HEAD_DIM, WIDTH)
    _clear(dk_base, None, end, gap_end, dk_stride, SLOT, GROUP, HEAD_DIM, WIDTH)
    _clear(dv_base, None, end, gap_end, dv_stride, SLOT, GROUP, HEAD_DIM, WIDTH)
    _clear(dq_base, None, tail, tail_end, dq_stride, SLOT, 1, HEAD_DIM, WIDTH)
    _clear(dk_base, None, tail, tail_end, dk_stride, SLOT, 1, HEAD_DIM, WIDTH)
    _clear(dv_base, None, tail, tail_end, dv_stride, SLOT, 1, HEAD_DIM, WIDTH)
    rows = _slot_rows(first, SLOT, GROUP)
    owned = rows < _per_row(end, GROUP)
    q = _load(q_base + head * q_head, first, q_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)
    k = _load(k_base + head * k_head, first, k_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)
    v = _load(v_base + head * v_head, first, v_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)
    do = _load(do_base + head * do_head, first, do_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)
    lse = tl.load(lse_base + head * statistic_stride + rows, mask=owned, other=NOTHING)
    # A row that sees nothing has lse = -inf: +inf gives it probability 0 everywhere.
    lse = tl.where(lse == NOTHING, float("inf"), lse * triton_math.LOG2_E)
    visible = _visible(starts, lengths, table, sample, exists, rows, segments, SLOT, GROUP)
    p = tl.where(visible, tl.exp2(_product(q, _turned(k)) * scale - tl.expand_dims(lse, -1)), 0.0)
    dp = _product(do, _turned(v))
    if DROPOUT:
        kept = _kept(rng_state, stream, head, sample_ids, sample, exists, threshold, SLOT, GROUP)
        dp = tl.where(kept, dp * keep_scale, 0.0)
        sent = tl.where(kept, p * keep_scale, 0.0).to(do.dtype)
    else:
        sent = p.to(do.dtype)
    delta = tl.sum(p * dp, -1)
    if GRAD_LSE:
        delta -= tl.load(grad_lse_base + head * statistic_stride + rows, mask=owned, other=0.0)
    ds = (p * (dp - tl.expand_dims(delta, -1))).to(q.dtype)
    _store(dq_base, _product(ds, k) * softmax_scale, first, dq_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)
    _store(dk_base, _product(_turned(ds), q) * softmax_scale, first, dk_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)
    _store(dv_base, _product(_turned(sent), do), first, dv_stride, owned, SLOT, GROUP, HEAD_DIM, WIDTH)
