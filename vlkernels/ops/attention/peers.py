"""What attention is timed on, and beside whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import SegmentMask
from vlkernels.core.spec import Arguments, Cost, InputMaker, Peer


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


def cost(qkv: Tensor, layout: SegmentLayout, mask: SegmentMask | None = None) -> Cost:
    table = SegmentMask.full(layout.num_segments) if mask is None else mask
    products = 2 * int(table.dense(layout).sum()) * qkv.shape[2] * qkv.shape[3]
    unit = qkv.numel() // 3 * qkv.element_size()
    return Cost(forward_bytes=4 * unit, backward_bytes=8 * unit, forward_flops=2 * products, backward_flops=5 * products)


BENCHMARKS = {
    "16 x 1..256, H12 K64": _benchmark(16, 1, 256, 12, 64),
    "128 x 5..15, H4 K32": _benchmark(128, 5, 15, 4, 32),
    "128 x 16 + 5..15, H4 K32": _benchmark(128, 5, 15, 4, 32, prefix=16),
    "128 x 16 + 5..15, H4 K32, prefix-LM": _benchmark(128, 5, 15, 4, 32, SegmentMask.prefix_lm(), prefix=16),
    "8 x 197, H12 K64": _benchmark(8, 197, 197, 12, 64),
}

PEERS = {
    "padded SDPA": Peer(partial(_prepare_padded, 1)),
    "length-sorted SDPA": Peer(partial(_prepare_padded, 4)),
}
