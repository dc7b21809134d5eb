"""What the contract tests and the benchmarks know about ``attention`` and ``attention_qkvpacked``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import SegmentMask
from vlkernels.core.spec import Arguments, Case, Cost, InputMaker, OpSpec, Peer
from vlkernels.ops.attention import functional, reference, variants

RAGGED = [[3, 5], [0, 4], [7, 0], [0, 0], [2, 2]]


def _streams(fill: InputMaker, queries: SegmentLayout, keys: SegmentLayout, heads: tuple[int, int], width: int) -> Arguments:
    rows = (queries.num_tokens, heads[0]), (keys.num_tokens, heads[1]), (keys.num_tokens, heads[1])
    q, k, v = (fill.normal(*shape, width) for shape in rows)
    return {"q": q, "k": k, "v": v, "layout": queries}


def _self(
    lengths: Sequence[Sequence[int]] = RAGGED,
    heads: tuple[int, int] = (2, 2),
    width: int = 8,
    mask: SegmentMask | None = None,
    capacity: int | None = None,
    **options: Any,
) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        layout = fill.layout(lengths, capacity=capacity, sample_ids=range(7, 7 + len(lengths)))
        return {**_streams(fill, layout, layout, heads, width), "mask": mask, **options}

    return make


def _empty(fill: InputMaker) -> Arguments:
    layout = fill.layout(torch.zeros(0, 2, dtype=torch.int64), capacity=3)
    return _streams(fill, layout, layout, (2, 2), 8)


def _cross(fill: InputMaker) -> Arguments:
    layout, keys = fill.layout(RAGGED), fill.layout([[4], [0], [9], [1], [3]])
    return {**_streams(fill, layout, keys, (2, 2), 8), "kv_layout": keys, "mask": SegmentMask([["full"], ["causal"]])}


def _ends_aligned(fill: InputMaker) -> Arguments:
    """Causal across streams, over more keys than a tile of any kernel holds."""
    layout, keys = fill.layout([[66], [135], [3]]), fill.layout([[128], [70], [65]])
    return {**_streams(fill, layout, keys, (1, 1), 16), "kv_layout": keys, "mask": SegmentMask.causal()}


def _negatives(fill: InputMaker) -> Arguments:
    layout, keys = fill.layout([[4], [2], [5], [3], [1], [6]]), fill.layout([[4, 3], [2, 6], [17, 0]])
    index = fill.integers(0, 3, (6,), dtype=torch.int32)
    return {**_streams(fill, layout, keys, (4, 2), 8), "kv_layout": keys, "kv_index": index, "return_lse": True}


def _dropped(fill: InputMaker) -> Arguments:
    return {**_self(mask=SegmentMask.prefix_lm(), capacity=25)(fill), "dropout_p": 0.3, "rng": fill.rng(), "stream": 5}


def _dropped_negatives(fill: InputMaker) -> Arguments:
    arguments = {**_negatives(fill), "return_lse": False}
    table = SegmentMask([["none", "full"]])
    return {**arguments, "mask": table, "dropout_p": 0.1, "rng": fill.rng(), "stream": 9}


def _biased(batch: int, heads: int) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        return {**_self(mask=SegmentMask.prefix_lm())(fill), "bias": fill.normal(batch, heads, 8, 9)}

    return make


def _packed(mask: SegmentMask | None, **options: Any) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        layout = fill.layout(RAGGED, capacity=25)
        return {"qkv": fill.normal(layout.num_tokens, 3, 2, 8), "layout": layout, "mask": mask, **options}

    return make


def _packed_fixed(fill: InputMaker) -> Arguments:
    return {"qkv": fill.normal(15, 3, 2, 8), "layout": fill.layout([[5]] * 3)}


def _benchmark(
    samples: int, low: int, high: int, heads: int, width: int, mask: SegmentMask | None = None, prefix: int = 0
) -> Callable[[InputMaker], Arguments]:
    """``samples`` of ``prefix`` tokens and then ``low .. high`` of another segment, evenly drawn."""

    def make(fill: InputMaker) -> Arguments:
        text = torch.randint(low, high + 1, (samples, 1), generator=torch.Generator().manual_seed(0))
        lengths = torch.cat([torch.full_like(text, prefix), text], dim=1) if prefix else text
        layout = fill.layout(lengths)
        return {"qkv": fill.normal(layout.num_tokens, 3, heads, width), "layout": layout, "mask": mask}

    return make


def _padded(samples: Sequence[int], qkv: Tensor, layout: SegmentLayout, mask: SegmentMask) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v of these samples padded to their longest, [B, H, L, K] views of one buffer, and the mask if one is needed."""
    starts, lengths = layout.starts[:, 0].tolist(), layout.lengths.sum(1).tolist()
    longest, dense = max(lengths[b] for b in samples), mask.dense(layout)
    padded = qkv.new_zeros((len(samples), longest, *qkv.shape[1:]))
    visible = torch.zeros(len(samples), 1, longest, longest, dtype=torch.bool, device=qkv.device)
    for row, b in enumerate(samples):
        own = slice(starts[b], starts[b] + lengths[b])
        padded[row, : lengths[b]] = qkv.detach()[own]
        visible[row, 0, : lengths[b], : lengths[b]] = dense[own, own]
    visible |= ~visible.any(-1, keepdim=True)  # padding rows attend to all: SDPA gives NaN for nothing
    parts = [t.transpose(1, 2).detach().requires_grad_() for t in padded.unbind(2)]
    return parts, None if visible.all() else visible


def _prepare_padded(
    batches: int, qkv: Tensor, layout: SegmentLayout, mask: SegmentMask | None = None
) -> tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]:
    """SDPA on samples sorted by length and cut into so many batches; sorting, padding and masks cost nothing."""
    order = torch.argsort(layout.lengths.sum(1)).tolist()
    size = -(-len(order) // batches)
    table = mask or SegmentMask.full(layout.num_segments)
    prepared = [_padded(order[i : i + size], qkv, layout, table) for i in range(0, len(order), size)]

    def attend() -> tuple[Tensor, ...]:
        return tuple(F.scaled_dot_product_attention(*parts, attn_mask=visible) for parts, visible in prepared)

    return attend, [part for parts, _ in prepared for part in parts]


def _cost(qkv: Tensor, layout: SegmentLayout, mask: SegmentMask | None = None) -> Cost:
    table = SegmentMask.full(layout.num_segments) if mask is None else mask
    products = 2 * int(table.dense(layout).sum()) * qkv.shape[2] * qkv.shape[3]
    unit = qkv.numel() // 3 * qkv.element_size()
    return Cost(forward_bytes=4 * unit, backward_bytes=8 * unit, forward_flops=2 * products, backward_flops=5 * products)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOLES = SegmentMask([["full", "none", "full"], ["none", "causal", "none"], ["full", "full", "causal"]])

SPECS = (
    OpSpec(
        name="attention",
        functional=functional.attention,
        reference=reference.attention,
        implementations=functional.IMPLEMENTATIONS,
        cases=(
            Case("full", _self(return_lse=True)),
            Case("prefix_lm", _self(mask=SegmentMask.prefix_lm(), capacity=26)),
            Case("causal", _self(mask=SegmentMask.causal(2), softmax_scale=0.5)),
            Case("holes", _self([[3, 4, 5], [0, 20, 1], [6, 0, 2]], mask=HOLES)),
            Case("grouped_heads", _self(heads=(6, 2), width=5, mask=SegmentMask.causal(2))),
            Case("longer_than_a_tile", _self([[70, 130], [1, 64]], heads=(1, 1), width=16, mask=SegmentMask.prefix_lm())),
            Case("cross", _cross),
            Case("ends_aligned", _ends_aligned),
            Case("negatives", _negatives),
            Case("dropout", _dropped),
            Case("dropout_negatives", _dropped_negatives),
            Case("bias", _biased(5, 2)),
            Case("shared_bias", _biased(1, 1)),
            Case("empty_batch", _empty),
        ),
        dtypes=DTYPES,
        variants=variants.variants,
    ),
    OpSpec(
        name="attention_qkvpacked",
        functional=functional.attention_qkvpacked,
        reference=reference.attention_qkvpacked,
        implementations=functional.IMPLEMENTATIONS,
        cases=(
            Case("fixed_length", _packed_fixed),
            Case("full", _packed(None)),
            Case("prefix_lm", _packed(SegmentMask.prefix_lm(), return_lse=False)),
        ),
        dtypes=DTYPES,
        benchmarks={
            "16 x 1..256, H12 K64": _benchmark(16, 1, 256, 12, 64),
            "128 x 5..15, H4 K32": _benchmark(128, 5, 15, 4, 32),
            "128 x 16 + 5..15, H4 K32": _benchmark(128, 5, 15, 4, 32, prefix=16),
            "128 x 16 + 5..15, H4 K32, prefix-LM": _benchmark(128, 5, 15, 4, 32, SegmentMask.prefix_lm(), prefix=16),
            "8 x 197, H12 K64": _benchmark(8, 197, 197, 12, 64),
        },
        peers={
            "padded SDPA": Peer(partial(_prepare_padded, 1)),
            "length-sorted SDPA": Peer(partial(_prepare_padded, 4)),
        },
        cost=_cost,
    ),
)
