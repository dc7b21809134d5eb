"""impl "flash": other people's variable-length kernels, one call for each group of query segments that sees one run of keys.

A call is a composite of differentiable parts: the rows of a group are taken, the library attends, its rows are put back. A
group that is a whole packed stream is read where it lies. Lengths are read on the device alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core.kept import kept
from vlkernels.core.layout import SegmentLayout
from vlkernels.core.library import eager_call, refuse_twice
from vlkernels.core.mask import CAUSAL, FULL, NONE, SegmentMask
from vlkernels.ops.attention.flash import libraries
from vlkernels.ops.attention.flash.libraries import Library

DTYPES = (torch.bfloat16, torch.float16)
MOST_HEAD_DIM = 256
SHARED = "gradients of keys that several samples read add up in any order"

Codes = tuple[tuple[int, ...], ...]


class Group(NamedTuple):
    """Query segments that see the key segments ``first .. last`` of their sample; ``causal``: with the ends aligned."""

    queries: tuple[int, ...]
    first: int
    last: int
    causal: bool


class Inexpressible(Exception):
    """Why a table is not made of such groups."""


def refusal(facts: Mapping[str, Any], library: Library | None = None) -> str | None:
    """Why no library here can serve a call; ``None`` when one can."""
    library = library or libraries.best()
    if facts["dtype"] not in DTYPES:
        return f"it computes in bfloat16 or float16, the inputs are {str(facts['dtype']).removeprefix('torch.')}"
    if facts["head_dim"] > MOST_HEAD_DIM or facts["head_dim"] % 8:
        return f"it serves heads of a multiple of 8 up to K = {MOST_HEAD_DIM}, got {facts['head_dim']}"
    if facts["bias"]:
        return "it takes no bias"
    if facts["dropout"]:
        return "its dropout cannot draw the masks of vk.Rng"
    if facts["lse_gradient"]:
        return "its lse has no gradient"
    if not facts["softmax_scale"] > 0:
        return f"it needs a positive softmax_scale, got {facts['softmax_scale']}"
    if facts["grouped"] and not library.grouped_heads:
        return f"{library.name} takes as many heads of k as of q in this version"
    if facts["deterministic"]:
        unsteady = library.unsteady() or (SHARED if facts["shared_keys"] else None)
        if unsteady is not None:
            return f"{unsteady}: pass deterministic=False"
    try:
        groups(facts["table"], facts["aligned"])
    except Inexpressible as reason:
        return str(reason)
    return None


def groups(table: Codes, aligned: bool) -> tuple[Group, ...]:
    """The calls that make up ``table``; ``aligned``: queries and keys are the same rows, so both ends of a segment align."""
    found: list[Group] = []
    for segment, row in enumerate(table):
        new = _group(segment, row, aligned)
        if new is None:
            continue
        mate = next((i for i, group in enumerate(found) if _joins(group, new)), None)
        if mate is None:
            found.append(new)
        else:
            found[mate] = Group(found[mate].queries + new.queries, new.first, new.last, new.causal)
    return tuple(found)


def _group(segment: int, row: Sequence[int], aligned: bool) -> Group | None:
    seen = [column for column, code in enumerate(row) if code != NONE]
    if not seen:
        return None
    first, last = seen[0], seen[-1]
    if seen != list(range(first, last + 1)):
        raise Inexpressible(f"it serves segments that see one run of keys, query segment {segment} sees key segments {seen}")
    if CAUSAL in row[:last]:
        raise Inexpressible(f"it serves a causal segment as the last one seen, query segment {segment} sees more after one")
    causal = row[last] == CAUSAL
    if causal and first != last and not aligned:
        raise Inexpressible(f"in another stream query segment {segment} may see full segments or one causal segment, not both")
    return Group((segment,), first, last, causal)


def _joins(group: Group, new: Group) -> bool:
    """Whether one call serves both: the same keys without a line, or a causal sequence that goes on."""
    if not group.causal and not new.causal:
        return (group.first, group.last) == (new.first, new.last)
    follows = group.queries[-1] == group.last == new.last - 1
    return group.causal and new.causal and follows and new.queries == (new.last,) and group.first == new.first


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SegmentLayout,
    mask: SegmentMask | None = None,
    kv_layout: SegmentLayout | None = None,
    kv_index: Tensor | None = None,
    softmax_scale: float | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    library: Library | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The functional's attention for what :func:`refusal` lets pass; ``library`` stands in for the best one here."""
    library = library or libraries.best()
    calls = _calls(layout, mask, None if kv_layout is layout else kv_layout, kv_index)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = _Entry.apply(calls.spare_keys, q, k, v)
    pieces = [_attend(q, k, v, call, scale, deterministic, return_lse, library) for call in calls.calls]
    rows = [call.queries.rows for call in calls.calls]
    if len(rows) == 1 and rows[0] is None:
        return pieces[0] if return_lse else pieces[0][0]
    out = _Assembled.apply(len(q), rows, *[out for out, _ in pieces]) if pieces else torch.zeros_like(q) + q[:0].sum()
    return (out, _assembled_lse(q, rows, [lse for _, lse in pieces])) if return_lse else out


class Rows(NamedTuple):
    """What a call reads of a stream: ``rows`` (None: all, as they lie; -1 past the last one), its samples at ``cu_seqlens``."""

    rows: Tensor | None
    cu_seqlens: Tensor
    longest: int


class VarlenCall(NamedTuple):
    """One call of the library; ``blind``: bool per query, those that see nothing (None: every one sees something)."""

    queries: Rows
    keys: Rows
    causal: bool
    blind: Tensor | None
    shared: bool


class Calls(NamedTuple):
    """The calls of a table, and the keys that belong to nobody, where a call reads their stream as it lies."""

    calls: tuple[VarlenCall, ...]
    spare_keys: Tensor | None


def lone_call(
    layout: SegmentLayout, mask: SegmentMask | None = None, kv_layout: SegmentLayout | None = None
) -> VarlenCall | None:
    """The library's call that is all there is to do: whole streams, in which every query sees something."""
    calls, spare_keys = _calls(layout, mask, None if kv_layout is layout else kv_layout, None)
    if len(calls) != 1 or spare_keys is not None:
        return None
    whole = calls[0].queries.rows is None and calls[0].keys.rows is None
    return calls[0] if whole and (calls[0].blind is None or not calls[0].blind.any()) else None


def _calls(layout: SegmentLayout, mask: SegmentMask | None, kv_layout: SegmentLayout | None, kv_index: Tensor | None) -> Calls:
    """:func:`_new_calls`, kept: the layers of a model share them."""
    if torch.compiler.is_compiling() or type(layout.starts) is not Tensor:  # fake tensors, a graph's among them
        return _new_calls(layout, mask, kv_layout, kv_index)
    keys = layout if kv_layout is None else kv_layout
    tensors = layout.starts, layout.lengths, keys.starts, keys.lengths, kv_index
    name = "flash", None if mask is None else mask.codes, kv_layout is None, _known(layout), _known(keys)
    with eager_call:
        return kept(name, tensors, lambda: _new_calls(layout, mask, kv_layout, kv_index))


def _known(layout: SegmentLayout) -> tuple[Any, ...]:
    """What the host knows of a layout, and builds on."""
    bounds = layout.num_tokens, layout.max_seqlen, layout.max_segment_lengths, layout.segment_totals
    return *bounds, layout.exact, layout.has_gaps


def _new_calls(
    layout: SegmentLayout, mask: SegmentMask | None, kv_layout: SegmentLayout | None, kv_index: Tensor | None
) -> Calls:
    keys, aligned = layout if kv_layout is None else kv_layout, kv_layout is None and kv_index is None
    table = full_table(layout, keys) if mask is None else mask.codes
    made = (_call(group, layout, keys, kv_index, aligned) for group in groups(table, aligned))
    calls = tuple(call for call in made if call is not None)
    in_place = any(call.keys.rows is None for call in calls)
    return Calls(calls, _spare(keys) if in_place and not keys.exact else None)


def full_table(layout: SegmentLayout, keys: SegmentLayout) -> Codes:
    return ((FULL,) * keys.num_segments,) * layout.num_segments


def _spare(layout: SegmentLayout) -> Tensor:
    """bool ``[T, 1, 1]``: rows past the last sample."""
    rows = torch.arange(layout.num_tokens, device=layout.device)
    return (rows >= layout.lengths.sum()).view(-1, 1, 1)


def _call(
    group: Group, layout: SegmentLayout, keys: SegmentLayout, kv_index: Tensor | None, aligned: bool
) -> VarlenCall | None:
    queries = _rows(layout, group.queries, None)
    seen = _rows(keys, range(group.first, group.last + 1), kv_index)
    if not queries.longest or not seen.longest:
        return None
    sees_itself = aligned and all(group.first <= segment <= group.last for segment in group.queries)
    blind = None if sees_itself and layout.exact else _blind(queries, seen, group.causal, _length(queries, layout))
    return VarlenCall(queries, seen, group.causal, blind, shared=kv_index is not None)


def _length(side: Rows, layout: SegmentLayout) -> int:
    return layout.num_tokens if side.rows is None else len(side.rows)


def _rows(layout: SegmentLayout, segments: Sequence[int], index: Tensor | None) -> Rows:
    chosen = list(segments)
    # Columns are stacked, not indexed: an index list would have to travel to the device.
    starts, lengths = (torch.stack([x[:, s] for s in chosen], dim=1) for x in (layout.starts, layout.lengths))
    longest = min(layout.max_seqlen, sum(layout.max_segment_lengths[s] for s in chosen))
    bound = min(layout.num_tokens, sum(layout.segment_totals[s] for s in chosen))
    if index is not None:
        starts, lengths = starts[index.long()], lengths[index.long()]
        bound = index.numel() * longest
    cu_seqlens = torch.nn.functional.pad(lengths.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
    whole = index is None and chosen == list(range(layout.num_segments)) and not layout.has_gaps
    return Rows(None if whole or longest == 0 else _sources(starts.flatten(), lengths.flatten(), bound), cu_seqlens, longest)


def _sources(starts: Tensor, lengths: Tensor, bound: int) -> Tensor:
    """int64 ``[bound]``: the rows of these runs one after the other, then -1."""
    ends = lengths.cumsum(0)
    position = torch.arange(bound, device=starts.device)
    run = torch.searchsorted(ends, position, right=True)
    inside = run < len(ends)
    run = run.clamp(max=len(ends) - 1)
    return torch.where(inside, (starts + lengths - ends)[run] + position, -1)


def _blind(queries: Rows, keys: Rows, causal: bool, count: int) -> Tensor:
    """bool ``[count, 1, 1]``: queries that see no key, and rows behind the last query."""
    ends = queries.cu_seqlens[1:].long()
    row = torch.arange(count, device=ends.device)
    sample = torch.searchsorted(ends, row, right=True)
    inside = sample < len(ends)
    sample = sample.clamp(max=len(ends) - 1)
    visible = keys.cu_seqlens.diff()[sample]
    if causal:
        visible = visible - (ends[sample] - 1 - row)
    return ((visible <= 0) | inside.logical_not()).view(-1, 1, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, scale: float, deterministic: bool, lse: bool, library: Library
) -> tuple[Tensor, Tensor | None]:
    q = q if call.queries.rows is None else _Taken.apply(q, call.queries.rows, False)
    k, v = (x if call.keys.rows is None else _Taken.apply(x, call.keys.rows, call.shared) for x in (k, v))
    if call.blind is not None:
        q = _Unmoved.apply(q, call.blind)
    bounds = call.queries.cu_seqlens, call.keys.cu_seqlens, call.queries.longest, call.keys.longest
    out, logarithms = library.attend(q, k, v, *bounds, call.causal, scale, deterministic, lse)
    if call.blind is None:
        return out, logarithms
    blind = call.blind.view(1, -1)
    return out.masked_fill(call.blind, 0), None if logarithms is None else logarithms.masked_fill(blind, -torch.inf)


class _Entry(torch.autograd.Function):
    """q, k, v as they are; gradients of keys that belong to nobody, which no library writes, become 0."""

    @staticmethod
    def forward(ctx: Any, spare_keys: Tensor | None, *qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.spare_keys = spare_keys
        return tuple(x.view_as(x) for x in qkv)

    @staticmethod
    @refuse_twice
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_q, *of_keys = grads
        if ctx.spare_keys is not None:
            of_keys = [None if grad is None else grad.masked_fill(ctx.spare_keys, 0) for grad in of_keys]
        return None, of_q, *of_keys


class _Unmoved(torch.autograd.Function):
    """x as it is; the gradients of blind rows, and of rows of nobody among them, become 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blind: Tensor) -> Tensor:
        ctx.blind = blind
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.masked_fill(ctx.blind, 0), None


class _Taken(torch.autograd.Function):
    """``x[rows]``; what stands at -1 does not matter. Gradients are copied, or added in float32 where rows are ``shared``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, shared: bool) -> Tensor:
        ctx.tokens, ctx.rows, ctx.shared = len(x), rows, shared
        return x.index_select(0, rows.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        dtype = torch.float32 if ctx.shared else grad.dtype
        scattered = grad.new_zeros((ctx.tokens + 1, *grad.shape[1:]), dtype=dtype)
        put = scattered.index_add_ if ctx.shared else scattered.index_copy_
        put(0, _or_last(ctx.rows, ctx.tokens), grad.to(dtype))
        return scattered[: ctx.tokens].to(grad.dtype), None, None


class _Assembled(torch.autograd.Function):
    """``[tokens, ...]``: the pieces at their rows, 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, tokens: int, rows: list[Tensor], *pieces: Tensor) -> Tensor:
        ctx.rows = rows
        return _placed(pieces[0].new_zeros((tokens + 1, *pieces[0].shape[1:])), 0, rows, pieces)[:tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad.index_select(0, rows.clamp(min=0)) for rows in ctx.rows)


def _assembled_lse(q: Tensor, rows: list[Tensor], pieces: list[Tensor]) -> Tensor:
    tokens, heads = q.shape[:2]
    lse = torch.full((heads, tokens + 1), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return _placed(lse, 1, rows, pieces)[:, :tokens]


def _placed(into: Tensor, dim: int, rows: Sequence[Tensor], pieces: Sequence[Tensor]) -> Tensor:
    for own, piece in zip(rows, pieces, strict=True):
        into.index_copy_(dim, _or_last(own, into.shape[dim] - 1), piece)
    return into


def _or_last(rows: Tensor, last: int) -> Tensor:
    """``rows`` with -1 turned to ``last``, a row that is thrown away."""
    return torch.where(rows < 0, last, rows)
