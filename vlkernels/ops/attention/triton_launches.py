"""impl "triton" on the host: outputs, work lists and the launches of both directions. Triton is imported by the first call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core import triton_runtime
from vlkernels.core.random import COLUMNS_PER_CALL, dropout_scale, dropout_threshold
from vlkernels.core.triton_runtime import LOG2_E, Launch
from vlkernels.ops.attention import work_list
from vlkernels.ops.attention.call import Call, split
from vlkernels.ops.attention.tile_sizes import MOST_HEAD_DIM, TileSizes, padded_head_dim, tile_sizes
from vlkernels.ops.attention.work_list import Side, Streams

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(facts: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot serve a call; ``None`` when they can."""
    if facts["dtype"] not in DTYPES:
        return f"it computes in float32, the inputs are {str(facts['dtype']).removeprefix('torch.')}"
    if facts["bias"]:
        return "it takes no bias"
    if facts["head_dim"] > MOST_HEAD_DIM:
        return f"it serves heads up to K = {MOST_HEAD_DIM}, got {facts['head_dim']}"
    if not facts["softmax_scale"] > 0:
        return f"it needs a positive softmax_scale, got {facts['softmax_scale']}"
    return None


class Options(NamedTuple):
    """What a call says beside its tensors."""

    rng_state: Tensor | None
    softmax_scale: float
    dropout_p: float
    stream: int
    architecture: int

    def drawn(self) -> tuple[int, int, float]:
        """The kernels' (stream, threshold, keep_scale)."""
        return self.stream, dropout_threshold(self.dropout_p), dropout_scale(self.dropout_p)


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    call = Call(*inputs)
    q, k, v = call.heads
    out, lse = q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    if _nothing(q, call.starts):
        return out.zero_(), lse.fill_(-torch.inf)
    streams, options = _where(call), _options(call)
    with torch.cuda.device_of(q):
        forward_launch(q, k, v, out, lse, streams, options).run()
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, *inputs: Any
) -> list[Tensor]:
    """The gradients in the form of ``qkv``."""
    call = Call(*inputs)
    q, k, v = call.heads
    grads = [x.new_empty(x.shape) for x in call.qkv]
    if _nothing(q, call.starts):
        return [grad.zero_() for grad in grads]
    streams, options = _where(call), _options(call)
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    dq, dk, dv = split(grads)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        query_gradient_launch(q, k, v, out, grad_out, lse, grad_lse, delta, dq, streams, options).run()
        key_gradient_launch(q, k, v, grad_out, lse, delta, dk, dv, streams, options).run()
    return grads


def forward_launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, streams: Streams, options: Options) -> Launch:
    sizes = _sizes("forward", q, options)
    side = work_list.query_side(streams, q.shape[0], sizes.queries)
    arguments = (
        q, k, v, out, lse, *side, options.rng_state, *_strides(q, k, v, out), lse.stride(0), q.shape[1] // k.shape[1],
        options.softmax_scale * LOG2_E, *options.drawn(),
    )  # fmt: skip
    return _launch(_kernels().forward_kernel, side, q.shape[1], arguments, q, options, sizes)


def query_gradient_launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None, delta: Tensor,
    dq: Tensor, streams: Streams, options: Options,
) -> Launch:  # fmt: skip
    sizes = _sizes("query_gradient", q, options)
    side = work_list.query_side(streams, q.shape[0], sizes.queries)
    arguments = (
        q, k, v, out, grad_out, lse, grad_lse, delta, dq, *side, options.rng_state, *_strides(q, k, v, out, grad_out, dq),
        lse.stride(0), q.shape[1] // k.shape[1], options.softmax_scale * LOG2_E, options.softmax_scale, *options.drawn(),
    )  # fmt: skip
    kernel = _kernels().query_gradient_kernel
    return _launch(kernel, side, q.shape[1], arguments, q, options, sizes, GRAD_LSE=grad_lse is not None)


def key_gradient_launch(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, streams: Streams,
    options: Options,
) -> Launch:  # fmt: skip
    sizes = _sizes("key_gradient", q, options)
    multiple = 1 if options.rng_state is None else COLUMNS_PER_CALL
    side = work_list.key_side(streams, k.shape[0], sizes.keys, multiple)
    arguments = (
        q, k, v, grad_out, lse, delta, dk, dv, *side, options.rng_state, *_strides(q, k, v, grad_out, dk, dv),
        lse.stride(0), q.shape[1] // k.shape[1], options.softmax_scale * LOG2_E, options.softmax_scale, *options.drawn(),
    )  # fmt: skip
    return _launch(_kernels().key_gradient_kernel, side, k.shape[1], arguments, q, options, sizes)


def _where(call: Call) -> Streams:
    sample_ids = None if call.rng_state is None else call.sample_ids
    return Streams(call.starts, call.lengths, call.kv_starts, call.kv_lengths, call.kv_index, call.table, sample_ids)


def _options(call: Call) -> Options:
    architecture = triton_runtime.architecture(call.starts.device)
    return Options(call.rng_state, call.softmax_scale, call.dropout_p, call.stream, architecture)


def _launch(
    kernel: Any, side: Side, heads: int, arguments: tuple[Any, ...], q: Tensor, options: Options, sizes: TileSizes, **flags: bool
) -> Launch:
    constants = {
        "QUERIES": sizes.queries,
        "KEYS": sizes.keys,
        "HEAD_DIM": q.shape[2],
        "WIDTH": padded_head_dim(q.shape[2]),
        "DROPOUT": options.rng_state is not None,
        **flags,
    }
    return Launch(kernel, (side.tiles.shape[0], heads), arguments, constants, sizes.warps, sizes.stages)


def _sizes(kernel: str, q: Tensor, options: Options) -> TileSizes:
    return tile_sizes(kernel, q.dtype, q.shape[2], options.rng_state is not None, options.architecture)


def _strides(*tensors: Tensor) -> list[int]:
    """(of a row, of a head) of every tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _nothing(q: Tensor, starts: Tensor) -> bool:
    """No samples, no rows or no heads: there is no tile to write the rows that belong to nobody."""
    return q.numel() == 0 or starts.numel() == 0


def _kernels() -> Any:
    from vlkernels.ops.attention import triton_kernels

    return triton_kernels
