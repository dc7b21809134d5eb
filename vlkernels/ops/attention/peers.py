"""Other people's ways to attend over packed samples, each in the form it likes best.

What a peer needs before its call (padding, sorting, masks, compiling) is done before the clock starts. Every peer shows first
that it computes the same: its output and gradients are compared with those of ``vk.attention``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import CAUSAL, FULL, SegmentMask
from vlkernels.core.spec import Arguments, Peer
from vlkernels.ops.attention import functional
from vlkernels.ops.attention.bias import RelativeBias
from vlkernels.ops.attention.flash import calls as flash
from vlkernels.ops.attention.flash.libraries import Library

# Difference from ours as a share of our norm, for each row of the output and for each gradient as a whole: roundings pass,
# another mask does not.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}


class Prepared(NamedTuple):
    """A peer's call, the parts of q, then of k, then of v that it reads, and the packed rows ``[T, H, K]`` of such parts.

    ``inputs`` beyond the 3 n parts are more that gets gradients (a bias).
    """

    call: Callable[[], Sequence[Tensor]]
    inputs: list[Tensor]
    packed: Callable[[Sequence[Tensor], SegmentLayout], Tensor]


def rival(build: Callable[..., Prepared], call: Callable[..., Tensor] = functional.attention) -> Peer:
    """The peer that ``build(q, k, v, **options)`` prepares; ``call`` is what it has to equal."""

    def prepare(**arguments: Any) -> tuple[Callable[[], Any], list[Tensor]]:
        q, k, v, options = _streams(arguments)
        made = build(q, k, v, **options)
        _check_equal(made, partial(call, **options), (q, k, v), options)
        return made.call, made.inputs

    return Peer(prepare)


def same_call(change: Callable[[Arguments], Arguments], call: Callable[..., Any]) -> Peer:
    """No rival: ``call`` on the same inputs, changed before every call."""

    def prepare(**arguments: Any) -> tuple[Callable[[], Any], list[Tensor]]:
        tensors = [arguments[name] for name in ("qkv", "q", "k", "v") if name in arguments]
        return lambda: call(**change(arguments)), tensors

    return Peer(prepare, rival=False)


def _streams(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor, Arguments]:
    options = dict(arguments)
    parts = options.pop("qkv").unbind(1) if "qkv" in options else [options.pop(name) for name in "qkv"]
    q, k, v = (x.detach() for x in parts)
    return q, k, v, options


def _check_equal(made: Prepared, ours: Callable[..., Tensor], qkv: Sequence[Tensor], options: Arguments) -> None:
    """Raise ``ValueError`` unless the output is ours and, of a peer that can be trained, the gradients."""
    queries, keys = options["layout"], options.get("kv_layout") or options["layout"]
    leaves = [x.clone().requires_grad_() for x in qkv]
    expected, actual = ours(*leaves), made.packed(made.call(), queries)
    _compare("output", actual.flatten(1), expected.flatten(1))
    if not actual.requires_grad:
        return
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    parts = len(made.inputs) // 3
    given = torch.autograd.grad(actual, made.inputs[: 3 * parts], cotangent)
    for i, layout in enumerate((queries, keys, keys)):
        gradient = made.packed(given[i * parts : (i + 1) * parts], layout)
        _compare(f"gradient of {'qkv'[i]}", gradient.reshape(1, -1), wanted[i].reshape(1, -1))


def _compare(name: str, theirs: Tensor, ours: Tensor) -> None:
    difference, size = (theirs.float() - ours.float()).norm(dim=1), ours.float().norm(dim=1)
    error = (difference / size.clamp(min=torch.finfo(torch.float32).tiny)).max().item()
    if not error <= TOLERANCE[ours.dtype]:
        raise ValueError(f"it computes something else: its {name} is off by {error:.2g} of ours")


def varlen(
    load: Callable[[], Library],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SegmentLayout,
    mask: SegmentMask | None = None,
    kv_layout: SegmentLayout | None = None,
) -> Prepared:
    """One variable-length call for each group of query segments, the rows of each gathered; bounds and indices are ready.

    Where one call is all there is to do, nothing of ours stands around it.
    """
    library, inputs = load(), [x.clone().requires_grad_() for x in (q, k, v)]
    lone = flash.lone_call(layout, mask, kv_layout)
    options = {"layout": layout, "mask": mask, "kv_layout": kv_layout, "deterministic": False, "library": library}

    def attend() -> tuple[Tensor]:
        if lone is None:
            return (flash.attention(*inputs, **options),)
        bounds = lone.queries.cu_seqlens, lone.keys.cu_seqlens, lone.queries.longest, lone.keys.longest
        return (library.attend(*inputs, *bounds, lone.causal, q.shape[2] ** -0.5, False, False)[0],)

    return Prepared(attend, inputs, lambda parts, _: parts[0])


def padded(
    batches: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SegmentLayout,
    mask: SegmentMask | None = None,
    kv_layout: SegmentLayout | None = None,
    relative_bias: RelativeBias | None = None,
    backend: SDPBackend | None = None,
) -> Prepared:
    """SDPA on samples sorted by length and cut into so many padded batches, each with a dense mask where it needs one."""
    keys = layout if kv_layout is None else kv_layout
    sizes = layout.lengths.sum(1)
    order = torch.argsort(sizes).split(-(-len(sizes) // batches))
    rows = [(_padded_rows(layout, samples), _padded_rows(keys, samples)) for samples in order]
    parts = [[_padded(x, pair[side]) for pair in rows] for x, side in ((q, 0), (k, 1), (v, 1))]
    masks = [_dense_mask(layout, keys, mask, samples) for samples in order]
    is_causal = mask == SegmentMask.causal(layout.num_segments) and int(sizes.min()) == int(sizes.max())
    biases = [] if relative_bias is None else [_dense_bias(relative_bias, pair, q.dtype) for pair in rows]

    def attend() -> list[Tensor]:
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            if is_causal:
                return [F.scaled_dot_product_attention(*streams, is_causal=True) for streams in zip(*parts)]
            added = [m if b is None else b for m, b in zip(masks, biases or [None] * len(masks))]
            return [F.scaled_dot_product_attention(*streams, attn_mask=a) for *streams, a in zip(*parts, added)]

    def packed(given: Sequence[Tensor], stream: SegmentLayout) -> Tensor:
        out = given[0].new_zeros((stream.num_tokens, given[0].shape[1], given[0].shape[3]))
        for samples, part in zip(order, given):
            own = _padded_rows(stream, samples)
            out = out.index_put((own[own >= 0],), part.transpose(1, 2)[own >= 0])
        return out

    return Prepared(attend, [x for stream in parts for x in stream] + biases, packed)


def dense_bias(
    q: Tensor, k: Tensor, v: Tensor, *, layout: SegmentLayout, coordinates: Tensor, tables: Sequence[Tensor], **buckets: Any
) -> Prepared:
    """Padded SDPA whose mask is the bias of every pair, materialised beforehand; the tables get no gradient from it."""
    return padded(1, q, k, v, layout=layout, relative_bias=RelativeBias(coordinates, tables, **buckets))


def _padded_rows(layout: SegmentLayout, samples: Tensor) -> Tensor:
    """int64 ``[b, L]``: the packed rows of these samples, -1 past their ends."""
    lengths = layout.lengths[samples].sum(1, keepdim=True)
    position = torch.arange(int(lengths.max()), device=lengths.device)
    return torch.where(position < lengths, layout.starts[samples, :1] + position, -1).long()


def _padded(x: Tensor, rows: Tensor) -> Tensor:
    """``[b, H, L, K]``, a view of ``[b, L, H, K]`` as a projection leaves it."""
    filled = x[rows.clamp(min=0)].masked_fill((rows < 0)[..., None, None], 0)
    return filled.transpose(1, 2).requires_grad_()


def _dense_mask(layout: SegmentLayout, keys: SegmentLayout, mask: SegmentMask | None, samples: Tensor) -> Tensor | None:
    """bool ``[b, 1, Lq, Lk]``, or None where all is seen; padding rows see all, because SDPA gives NaN for nothing."""
    (q_segment, q_left), (k_segment, k_left) = (_where(stream, samples) for stream in (layout, keys))
    table = flash.full_table(layout, keys) if mask is None else mask.codes
    codes = torch.tensor([[*row, 0] for row in table] + [[0] * (keys.num_segments + 1)], device=samples.device)
    code = codes[q_segment[:, :, None], k_segment[:, None, :]]
    visible = (code == FULL) | ((code == CAUSAL) & (k_left[:, None, :] >= q_left[:, :, None]))
    visible |= ~visible.any(-1, keepdim=True)
    return None if visible.all() else visible.unsqueeze(1)


def _where(layout: SegmentLayout, samples: Tensor) -> tuple[Tensor, Tensor]:
    """int64 ``[b, L]``: the segment of every position (S past the end), and the tokens from there to its end."""
    ends = layout.lengths[samples].long().cumsum(1)
    position = torch.arange(int(ends[:, -1].max()), device=ends.device).repeat(len(samples), 1)
    segment = torch.searchsorted(ends, position, right=True)
    return segment, ends.gather(1, segment.clamp(max=layout.num_segments - 1)) - position


def _dense_bias(bias: RelativeBias, rows: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """``[b, H, L, L]``, materialised; a leaf: its gradient is not taken on to the tables. -inf hides the padding."""
    coordinates = bias.coordinates[rows[0].clamp(min=0)].long()
    dense = torch.zeros(len(coordinates), bias.num_heads, *[coordinates.shape[1]] * 2, device=coordinates.device)
    for c in range(coordinates.shape[2]):
        distance = coordinates[:, None, :, c] - coordinates[:, :, None, c]
        dense += bias.distance_bias.detach()[:, c][:, distance.clamp(-bias.radius, bias.radius) + bias.radius].transpose(0, 1)
    hidden = (rows[1] < 0)[:, None, None, :]
    return dense.masked_fill(hidden, -torch.inf).to(dtype).requires_grad_()


def jagged(q: Tensor, k: Tensor, v: Tensor, *, layout: SegmentLayout, mask: SegmentMask | None = None) -> Prepared:
    """SDPA on nested tensors, which have no masks between segments."""
    if mask is not None and mask != SegmentMask.full(layout.num_segments):
        raise NotImplementedError("nested tensors take no mask")
    lengths, offsets = layout.lengths.sum(1), layout.cu_seqlens.long()
    bounds = {"min_seqlen": int(lengths.min()), "max_seqlen": int(lengths.max())}
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]

    def attend() -> tuple[Tensor]:
        nested = [torch.nested.nested_tensor_from_jagged(x, offsets, **bounds).transpose(1, 2) for x in inputs]
        return (F.scaled_dot_product_attention(*nested).transpose(1, 2).values(),)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors are a prototype
        attend()
    return Prepared(attend, inputs, lambda parts, _: parts[0])


def flex(q: Tensor, k: Tensor, v: Tensor, *, layout: SegmentLayout, mask: SegmentMask | None = None) -> Prepared:
    """FlexAttention, compiled for these shapes, over the whole stream; its BlockMask is ready. It does not train on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    on_card = q.is_cuda
    inputs = [x.transpose(0, 1).unsqueeze(0).contiguous().requires_grad_(on_card) for x in (q, k, v)]
    torch.compiler.reset()  # past a few shapes it would fall back to the uncompiled code
    call = torch.compile(flex_attention, dynamic=False) if on_card else flex_attention
    seen = _block_mask(layout, mask)()

    def attend() -> tuple[Tensor]:
        return (call(*inputs, block_mask=seen),)

    return Prepared(attend, inputs, lambda parts, _: parts[0].squeeze(0).transpose(0, 1))


def block_mask(layout: SegmentLayout, mask: SegmentMask | None = None, **_: Any) -> tuple[Callable[[], Any], list[Tensor]]:
    """FlexAttention's BlockMask alone, which every batch with other lengths needs anew."""
    make = _block_mask(layout, mask)
    make()
    return make, []


def _block_mask(layout: SegmentLayout, mask: SegmentMask | None) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    sample, segment = layout.token_sample(), layout.token_segment()
    segments, table = layout.num_segments, None if mask is None else mask.table(layout.device)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = sample[i] == sample[j]
        if table is None:
            return same
        code = table[segment[i] * segments + segment[j]]
        return same & ((code == FULL) | ((code == CAUSAL) & (j <= i)))

    tokens, device = layout.num_tokens, layout.device
    create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return lambda: create(visible, None, None, tokens, tokens, device=device)


def fresh_layout(arguments: Arguments) -> Arguments:
    """The same lengths as a new batch brings them: nothing that was made from them is kept."""
    return {**arguments, "layout": arguments["layout"]._with_tensors(Tensor.clone)}
