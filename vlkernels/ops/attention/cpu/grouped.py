"""impl "torch": a ragged batch becomes a few calls over tiles of samples of like length, forward and explicit backward.

Rows are gathered into tiles (views where they follow each other) and the results are put back in one pass, so nothing is
padded to the longest sample. The backward computes the probabilities again from lse. Half types are computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlkernels.ops.attention.call import Call
from vlkernels.ops.attention.cpu.tile_kernels import STEP_SCORES, Fused, Products
from vlkernels.ops.attention.cpu.tiles import Plan, Side, make_plan

UNLIMITED = 2**62


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    call = Call(*inputs)
    q, k, v = call.heads
    fused = _fused(call)
    kernel = Fused(call.softmax_scale) if fused else Products.of(call)
    plan = _plan(call, fused)
    exact = torch.promote_types(q.dtype, torch.float32)

    outs, lses = [], []
    for tile in plan.tiles:
        tile_q = _take(q, tile.query_rows, tile.queries, exact)
        tile_k, tile_v = (_take(x, tile.key_rows, tile.keys, exact) for x in (k, v))
        out, lse = kernel.forward(tile, tile_q, tile_k, tile_v)
        outs.append(_rows(out))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    lse = _placed(lses, plan.queries, q.shape[1:2], -torch.inf, q.new_empty((), dtype=exact))
    return _placed(outs, plan.queries, q.shape[1:], 0.0, q.new_empty((), dtype=exact)).to(q.dtype), lse.T.contiguous()


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, *inputs: Any
) -> list[Tensor]:
    """The gradients in the form of ``qkv``, then that of the bias if ``bias_grad``."""
    call = Call(*inputs)
    q, k, v = call.heads
    exact = lse.dtype
    fused = _fused(call) and grad_lse is None
    plan = _plan(call, fused)
    kernel = Fused(call.softmax_scale) if fused else Products.of(call, bias_grad)
    # lse = inf gives a row probability 0: rows of padding, and rows that a bias hides.
    lse_rows = torch.cat([lse.T.masked_fill(lse.T == -torch.inf, torch.inf), lse.new_full((1, lse.shape[0]), torch.inf)])
    grad_lse_rows = None if grad_lse is None else torch.nn.functional.pad(grad_lse.T, (0, 0, 0, 1))

    parts: tuple[list[Tensor], ...] = ([], [], [])
    for tile in plan.tiles:
        tile_do, tile_q, tile_out = (_take(x, tile.query_rows, tile.queries, exact) for x in (grad_out, q, out))
        tile_k, tile_v = (_take(x, tile.key_rows, tile.keys, exact) for x in (k, v))
        statistics = [lse_rows] if grad_lse_rows is None else [lse_rows, grad_lse_rows]
        statistics = [_take(x, tile.statistic_rows, tile.queries, exact) for x in statistics]
        grads = kernel.backward(tile, tile_do, tile_q, tile_k, tile_v, tile_out, *statistics)
        for found, grad in zip(parts, grads):
            found.append(_rows(grad))
    sides = (plan.queries, plan.keys, plan.keys)
    dq, dk, dv = (_placed(p, s, x.shape[1:], 0.0, lse) for p, s, x in zip(parts, sides, (q, k, v)))
    grads = [torch.stack((dq, dk, dv), dim=1)] if len(call.qkv) == 1 else [dq, dk, dv]
    grads = [grad.to(q.dtype) for grad in grads]
    return [*grads, kernel.bias.grad.to(kernel.bias.values.dtype)] if bias_grad else grads


def _fused(call: Call) -> bool:
    """Whether PyTorch's blocked kernel computes the call: all that it lacks is absent."""
    q, k, _ = call.heads
    return call.bias is None and call.distance_bias is None and call.rng_state is None and q.shape[1] == k.shape[1]


def _plan(call: Call, fused: bool) -> Plan:
    q, k, _ = call.heads
    own = call.starts, call.lengths
    kv_starts, kv_lengths = own if call.kv_starts is None else (call.kv_starts, call.kv_lengths)
    return make_plan(
        *(tuple(t.flatten().tolist()) for t in (*own, kv_starts, kv_lengths)),
        None if call.kv_index is None else tuple(call.kv_index.tolist()),
        tuple(call.table.tolist()),
        segments=(call.lengths.shape[1], kv_lengths.shape[1]),
        tokens=(q.shape[0], k.shape[0]),
        heads=q.shape[1],
        most_scores=UNLIMITED if fused else STEP_SCORES,
    )


def _take(x: Tensor, rows: Tensor | slice, length: int, dtype: torch.dtype) -> Tensor:
    """``[T, H, ...]`` -> ``[n, H, length, ...]`` for the ``n * length`` rows of a tile."""
    if isinstance(rows, slice):
        taken = x[rows]
    else:
        taken = x.flatten(1).index_select(0, rows).unflatten(1, x.shape[1:])
    return taken.to(dtype).unflatten(0, (-1, length)).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """``[n, H, L, K]`` -> ``[n * L, H, K]``."""
    return x.transpose(1, 2).flatten(0, 1)


def _placed(parts: list[Tensor], side: Side, shape: torch.Size, nowhere: float, like: Tensor) -> Tensor:
    """The rows of all tiles in packed order, summed where a row stands in several tiles, ``nowhere`` where in none."""
    if side.identity and parts:
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    flat = [part.flatten(1) for part in parts]
    width = shape.numel()
    if side.places is not None:
        rows = torch.cat([*flat, like.new_full((1, width), nowhere)]).index_select(0, side.places)
    else:
        rows = like.new_zeros((side.tokens, width)).index_add_(0, side.rows, torch.cat(flat))
    return rows.view(-1, *shape)
