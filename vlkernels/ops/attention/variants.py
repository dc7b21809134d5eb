"""The kernels of impl "triton" that the static report compiles: the head widths, flags and dtypes that recipes meet."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import SegmentMask
from vlkernels.core.random import Rng
from vlkernels.core.spec import Variant
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.attention import triton_launches
from vlkernels.ops.attention.triton_launches import Options
from vlkernels.ops.attention.work_list import Streams

HEADS = 2
CALLS = (
    *[(torch.bfloat16, head_dim, dropout) for head_dim in (64, 80, 128) for dropout in (False, True)],
    (torch.bfloat16, 256, False),
    (torch.float16, 64, False),
    (torch.float32, 64, False),
)


def variants(architecture: int) -> Iterator[Variant]:
    for dtype, head_dim, dropout in CALLS:
        facts = {"dtype": str(dtype).removeprefix("torch."), "head_dim": head_dim, "dropout": dropout}
        for kernel, launch in launches(dtype, head_dim, dropout, architecture).items():
            yield Variant(kernel, facts, launch)


def launches(
    dtype: torch.dtype, head_dim: int, dropout: bool, architecture: int, layout: SegmentLayout | None = None
) -> dict[str, Launch]:
    """The three kernels of a call on views of a fused projection, without data worth reading."""
    layout = layout or SegmentLayout([[5, 3], [2, 4]])
    table = SegmentMask.full(layout.num_segments).table("cpu")
    (q, k, v), (dq, dk, dv) = (torch.empty(layout.num_tokens, 3, HEADS, head_dim, dtype=dtype).unbind(1) for _ in range(2))
    out, grad_out = torch.empty_like(q), torch.empty_like(q)
    lse, delta = (torch.empty(HEADS, layout.num_tokens) for _ in range(2))
    streams = Streams(layout.starts, layout.lengths, None, None, None, table, layout.sample_ids if dropout else None)
    options = Options(Rng(0).state if dropout else None, head_dim**-0.5, 0.1 if dropout else 0.0, 1, architecture)
    return {
        "forward": triton_launches.forward_launch(q, k, v, out, lse, streams, options),
        "query_gradient": triton_launches.query_gradient_launch(q, k, v, out, grad_out, lse, None, delta, dq, streams, options),
        "key_gradient": triton_launches.key_gradient_launch(q, k, v, grad_out, lse, delta, dk, dv, streams, options),
    }
