"""impl "triton" for short samples of one stream, on the host: which calls it serves, slots, and the launches of both directions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core.triton_runtime import LOG2_E, Launch, family
from vlkernels.ops.attention.call import Call, strides
from vlkernels.ops.attention.gpu.tile_sizes import padded_head_dim

DTYPES = (torch.bfloat16, torch.float16)


class Slot(NamedTuple):
    """Rows kept for a sample, samples of a program, its warps: a sample of a group has a warp."""

    rows: int
    group: int
    warps: int


# By the width a head is padded to (64: up to 64), the shortest first. Taken from compiles for absent cards: they spill nothing.
SLOTS = {
    64: (Slot(16, 4, 4), Slot(32, 4, 4), Slot(64, 1, 4), Slot(128, 1, 8)),
    128: (Slot(16, 4, 4), Slot(64, 1, 4), Slot(128, 1, 8)),
}
# Families of architectures and whether there is dropout, where 128 rows fit into the registers.
LONG_SLOTS = ((90, False), (90, True), (100, False))
MOST_ROWS = 64


def slot(longest: int, dtype: torch.dtype, head_dim: int, dropout: bool, architecture: int) -> Slot | None:
    """Where samples of up to ``longest`` tokens fit; ``None`` where they do not."""
    width = max(64, padded_head_dim(head_dim))
    fits = longest <= MOST_ROWS or (family(architecture), dropout) in LONG_SLOTS
    if dtype not in DTYPES or width not in SLOTS or not fits:
        return None
    return next((found for found in SLOTS[width] if found.rows >= longest), None)


def serves(call: Call, architecture: int) -> bool:
    """Whether every sample of the call fits into a slot, and the call asks for nothing that these kernels lack."""
    q, k, _ = call.heads
    one_stream = call.kv_starts is None and call.kv_index is None
    plain = call.bias is None and call.distance_bias is None and q.shape[1] == k.shape[1]
    return one_stream and plain and _slot(call, architecture) is not None


def forward_launch(call: Call, out: Tensor, lse: Tensor, architecture: int) -> Launch:
    q, k, v = call.heads
    arguments = (
        q, k, v, out, lse, *_samples(call), *strides(q, k, v, out), lse.stride(0), *_counts(call),
        call.softmax_scale * LOG2_E, *call.drawn,
    )  # fmt: skip
    return _launch(_kernels().forward_kernel, call, arguments, architecture)


def backward_launch(
    call: Call, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None, grads: tuple[Tensor, Tensor, Tensor], architecture: int
) -> Launch:
    q, k, v = call.heads
    arguments = (
        q, k, v, grad_out, lse, grad_lse, *grads, *_samples(call), *strides(q, k, v, grad_out, *grads), lse.stride(0),
        *_counts(call), call.softmax_scale * LOG2_E, call.softmax_scale, *call.drawn,
    )  # fmt: skip
    return _launch(_kernels().backward_kernel, call, arguments, architecture, GRAD_LSE=grad_lse is not None)


def _slot(call: Call, architecture: int) -> Slot | None:
    q = call.qkv[0]
    return slot(call.longest, q.dtype, q.shape[-1], call.rng_state is not None, architecture)


def _samples(call: Call) -> tuple[Tensor | None, ...]:
    """Where the samples lie, what they see, and what their draws are keyed by."""
    found = call.starts, call.lengths, call.table, None if call.rng_state is None else call.sample_ids, call.rng_state
    assert all(t is None or t.is_contiguous() for t in found), "the kernels read these tensors without strides"
    return found


def _counts(call: Call) -> tuple[int, ...]:
    """The kernels' (heads, samples, segments, tokens)."""
    q = call.heads[0]
    return q.shape[1], *call.starts.shape, q.shape[0]


def _launch(kernel: Any, call: Call, arguments: tuple[Any, ...], architecture: int, **flags: bool) -> Launch:
    found, (samples, _), (_, heads, head_dim) = _slot(call, architecture), call.starts.shape, call.heads[0].shape
    assert found is not None, "only what is served is launched"
    constants = {
        "SLOT": found.rows,
        "GROUP": found.group,
        "HEAD_DIM": head_dim,
        "WIDTH": padded_head_dim(head_dim),
        "DROPOUT": call.rng_state is not None,
        **flags,
    }
    # One dimension: the others end at 65,535. Heads are neighbours, because their rows are.
    return Launch(kernel, (-(-samples // found.group) * heads,), arguments, constants, found.warps, stages=1)


def _kernels() -> Any:
    from vlkernels.ops.attention.gpu import resident_kernels

    return resident_kernels
