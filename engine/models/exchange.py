"""Packed streams of all ranks put together, with gradients: what global hard negatives are drawn from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import vlkernels as vk
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.models.transformer import Tokens


def gather_tokens(tokens: Tokens, group: dist.ProcessGroup) -> Tokens:
    """The samples of every rank as one stream, in rank order; each rank brings equally many samples.

    The gradient of a row is the sum of what all ranks send back for it. With losses scaled for a mean over
    ranks (DDP, ZeRO) every parameter's gradient is then that of one process on the concatenated batch.
    """
    lengths = _gather_equal(tokens.layout.lengths, group)
    host_lengths = lengths.cpu()
    rows = host_lengths.view(dist.get_world_size(group), -1).sum(1).tolist()
    assert rows[dist.get_rank(group)] == len(tokens.hidden), "a stream with spare rows cannot be exchanged"
    layout = vk.SegmentLayout(host_lengths, sample_ids=_gather_equal(tokens.layout.sample_ids, group).cpu())
    hidden = _GatherRows.apply(tokens.hidden, rows, group)
    return Tokens(hidden, layout.to(tokens.hidden.device, non_blocking=True))


def _gather_equal(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


class _GatherRows(torch.autograd.Function):
    """Unevenly many rows of every rank; both directions travel padded to the longest, as gloo and NCCL
    ask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.rows, ctx.group = rows, group
        padded = x.new_zeros(max(rows), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        outgoing = grad.new_zeros(len(ctx.rows), max(ctx.rows), *grad.shape[1:])
        for part, mine in zip(outgoing, grad.split(ctx.rows), strict=True):
            part[: len(mine)] = mine
        own = torch.empty_like(outgoing[0])
        dist.reduce_scatter(own, list(outgoing.unbind()), op=dist.ReduceOp.SUM, group=ctx.group)
        return own[: ctx.rows[dist.get_rank(ctx.group)]], None, None
