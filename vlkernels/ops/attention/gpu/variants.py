"""The kernels of impl "triton" that the static report compiles: the head widths, flags and dtypes that recipes meet."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import SegmentMask
from vlkernels.core.random import Rng
from vlkernels.core.spec import Variant
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.attention.call import Call
from vlkernels.ops.attention.gpu import launches as streaming, resident, work_list

HEADS = 2
RADIUS = 128
CALLS = (
    *[(torch.bfloat16, head_dim, dropout) for head_dim in (64, 128, 256) for dropout in (False, True)],
    (torch.bfloat16, 32, False),
    (torch.bfloat16, 96, False),
    (torch.float16, 64, False),
    (torch.float16, 128, False),
    (torch.float32, 64, False),
)
# The fourth says which bias, see :func:`launches`. They take long to compile: the cards of the targets alone.
BIASED_CALLS = (
    (torch.bfloat16, 64, False, "own"),
    (torch.bfloat16, 64, True, 3),
    (torch.bfloat16, 128, False, 1),
    (torch.bfloat16, 128, True, "shared"),
)
BIASED_ARCHITECTURES = (90, 100)
# The samples of these calls fill a slot.
RESIDENT_CALLS = (
    *[(64, rows, dropout) for rows in (16, 32, 64, 128) for dropout in (False, True)],
    *[(128, rows, dropout) for rows in (64, 128) for dropout in (False, True)],
)


def variants(architecture: int) -> Iterator[Variant]:
    biased = BIASED_CALLS if architecture in BIASED_ARCHITECTURES else ()
    for dtype, head_dim, dropout, *bias in (*CALLS, *biased):
        facts = {"dtype": str(dtype).removeprefix("torch."), "head_dim": head_dim, "dropout": dropout}
        if bias:
            facts["bias"] = bias[0] if isinstance(bias[0], str) else f"{bias[0]} distances"
        for kernel, launch in launches(dtype, head_dim, dropout, architecture, bias=bias[0] if bias else None).items():
            yield Variant(kernel, facts, launch)
    for head_dim, rows, dropout in RESIDENT_CALLS:
        layout = SegmentLayout([[rows - 1, 1], [2, 4]])
        facts = {"dtype": "bfloat16", "head_dim": head_dim, "dropout": dropout, "slot": rows}
        for kernel, launch in resident_launches(torch.bfloat16, head_dim, dropout, architecture, layout).items():
            yield Variant(kernel, facts, launch)
    for kernel, launch in work_list.work_list_launches(architecture).items():
        yield Variant(kernel, {"dtype": "int32"}, launch)


def launches(
    dtype: torch.dtype, head_dim: int, dropout: bool, architecture: int, layout: SegmentLayout | None = None,
    bias: str | int | None = None,
) -> dict[str, Launch]:  # fmt: skip
    """The kernels of a call on views of a fused projection, without data worth reading.

    ``bias``: ``"own"`` or ``"shared"`` for a tensor, or the number of coordinates of a relative one.
    """
    layout = layout or SegmentLayout([[5, 3], [2, 4]])
    call = _call(dtype, head_dim, dropout, layout, bias)
    (dq, dk, dv) = torch.empty_like(call.qkv[0]).unbind(1)
    out, grad_out = torch.empty_like(dq), torch.empty_like(dq)
    lse, delta = (torch.empty(HEADS, layout.num_tokens) for _ in range(2))
    stored = call.bias if bias == "own" else None
    found = {
        "forward": streaming.forward_launch(call, out, lse, architecture),
        "query_gradient": streaming.query_gradient_launch(call, out, grad_out, lse, None, delta, dq, stored, architecture),
        "key_gradient": streaming.key_gradient_launch(call, grad_out, lse, delta, dk, dv, architecture),
    }
    if bias == "shared":
        sums = torch.empty(2, *call.bias.shape)
        found["shared_gradient"] = streaming.shared_gradient_launch(call, grad_out, lse, delta, sums, architecture)
    if call.distance_bias is not None:
        counts, fixed = torch.empty(2, *call.distance_bias.shape, dtype=torch.int64), torch.empty(())
        found["distance_gradient"] = streaming.distance_gradient_launch(call, grad_out, lse, delta, counts, fixed, architecture)
    return found


def resident_launches(
    dtype: torch.dtype, head_dim: int, dropout: bool, architecture: int, layout: SegmentLayout
) -> dict[str, Launch]:
    """The kernels of a call whose samples have a slot each; none where they do not fit into one."""
    call = _call(dtype, head_dim, dropout, layout, None)
    if not resident.serves(call, architecture):
        return {}
    out, *grads = (torch.empty_like(call.heads[0]) for _ in range(4))
    lse = torch.empty(HEADS, layout.num_tokens)
    return {
        "resident_forward": resident.forward_launch(call, out, lse, architecture),
        "resident_backward": resident.backward_launch(call, out, lse, None, tuple(grads), architecture),
    }


def _call(dtype: torch.dtype, head_dim: int, dropout: bool, layout: SegmentLayout, bias: str | int | None) -> Call:
    qkv = torch.empty(layout.num_tokens, 3, HEADS, head_dim, dtype=dtype)
    table = SegmentMask.full(layout.num_segments).table("cpu")
    planar = distance_bias = coordinates = None
    if isinstance(bias, int):
        distance_bias = torch.empty(HEADS, bias, 2 * RADIUS + 1)
        coordinates = torch.empty(layout.num_tokens, bias, dtype=torch.int32)
    elif bias is not None:
        samples = layout.num_samples if bias == "own" else 1
        planar = torch.empty(samples, HEADS, layout.max_seqlen, layout.max_seqlen, dtype=dtype)
    rng_state = Rng(0).state if dropout else None
    return Call(
        [qkv], layout.starts, layout.lengths, None, None, None, table, planar, distance_bias, coordinates, None,
        layout.sample_ids, rng_state, head_dim**-0.5, 0.1 if dropout else 0.0, 1, layout.max_seqlen, RADIUS,
    )  # fmt: skip
