"""impl "cpp": the compiled CPU kernels for short samples, as one op in each direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Keys are not cut into blocks: beyond this many PyTorch's kernel, which cuts them, is faster (see MATH.md).
MOST_KEYS = 1024


def refusal(facts: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot serve a call; ``None`` when they can."""
    if facts["dtype"] not in DTYPES:
        return f"it computes in float32, the inputs are {str(facts['dtype']).removeprefix('torch.')}"
    if facts["bias"]:
        return "it takes no bias"
    if facts["keys"] > MOST_KEYS:
        return f"the longest sample has {facts['keys']} keys, it serves up to {MOST_KEYS}"
    return None


def _out_shape(qkv: list[Tensor]) -> tuple[int, int, int]:
    """``[T, H, K]`` of ``[qkv]`` (one ``[T, 3, H, K]``) or ``[q, k, v]``."""
    return qkv[0].shape[0], qkv[0].shape[-2], qkv[0].shape[-1]


def _forward_fake(qkv: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, width = _out_shape(qkv)
    lse = qkv[0].new_empty((heads, tokens), dtype=torch.float32)
    return qkv[0].new_empty((tokens, heads, width)), lse


def _backward_fake(grad_out: Tensor, grad_lse: Tensor | None, qkv: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in qkv]


_INPUTS = (
    "Tensor[] qkv, Tensor starts, Tensor lengths, Tensor? kv_starts, Tensor? kv_lengths, Tensor? kv_index, "
    "Tensor table, Tensor sample_ids, Tensor? rng_state"
)
_OPTIONS = "float softmax_scale, int dropout_threshold, SymInt stream"
_forward = library.define(
    f"attention_cpp_forward({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)", fake=_forward_fake
)
_backward = library.define_backward(
    f"attention_cpp_backward(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor lse, {_OPTIONS}) -> Tensor[]",
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *tensors = inputs[:9]
    ctx.save_for_backward(*qkv, *tensors, output[1])
    ctx.members = len(qkv)
    ctx.options = inputs[9:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    qkv, tensors, lse = list(saved[: ctx.members]), saved[ctx.members : -1], saved[-1]
    if grad_out is None:
        grad_out = qkv[0].new_zeros(_out_shape(qkv))
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    if grad_lse is not None:  # the lse of a query that sees nothing is a constant: whatever arrives there stays there
        grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0).contiguous()
    grads = _backward(grad_out, grad_lse, qkv, *tensors, lse, *ctx.options)
    return (list(grads), *[None] * 11)


attend = library.differentiable(_forward, setup_context=_setup_context, backward=_differentiate)
