"""What ``layer_norm`` and ``rms_norm`` are timed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.peers import Build, compiled, loaded, rival
from vlkernels.core.spec import Arguments, Benchmark, Cost, InputMaker, Peer
from vlkernels.ops.layer_norm import functional, peers

# (rows, width), the most telling first, which is also timed in float32
FUSED = ((65_536, 768), (16_384, 768), (4_096, 768), (131_072, 768), (16_384, 1024), (65_536, 1024), (131_072, 1024))
PLAIN = ((65_536, 768), (16_384, 768), (4_096, 768), (65_536, 1024), (131_072, 1024))
RMS = ((65_536, 768), (16_384, 768), (4_096, 768), (65_536, 1024))
DROPOUT = 0.1
CPU_DTYPES = (torch.float32, torch.bfloat16)


def cost(
    x: Tensor,
    residual: Tensor | None = None,
    linear_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    row_scale: Tensor | None = None,
    **_: Any,
) -> Cost:
    """MATH.md's table of a call that is trained."""
    unit = x.numel() * x.element_size()
    scaled = dropout_p > 0 or row_scale is not None
    keeps_sum = scaled or residual is not None or linear_bias is not None
    forward = 2 + (residual is not None) + keeps_sum
    return Cost(forward_bytes=forward * unit, backward_bytes=(3 + scaled) * unit)


def _on_cpu(rows: int, width: int, **options: float) -> Benchmark:
    def make(fill: InputMaker) -> Arguments:
        data = {name: fill.normal(rows, width) for name in ("x", "residual")}
        parameters = {name: fill.normal(width) for name in ("weight", "bias")}
        if options:
            parameters["linear_bias"] = fill.normal(width)
        return {**data, **parameters, **options}

    return Benchmark(make, ("cpu",), CPU_DTYPES)


def _rivals(builds: Mapping[str, Build], ours: Callable[..., Any]) -> dict[str, Peer]:
    return {name: rival(build, ours) for name, build in builds.items()}


PEERS = _rivals(
    {
        "eager": loaded(lambda: peers.eager),
        "torch.compile": compiled(loaded(lambda: peers.eager)),
        "apex FusedLayerNorm": loaded(peers.apex_fused),
        "apex FastLayerNorm": loaded(peers.apex_fast),
        "Liger": loaded(peers.liger),
        "flash-attn Triton": loaded(peers.flash_attn),
        "QuACK": loaded(peers.quack, peers.with_float_parameters),
    },
    functional.layer_norm,
)
RMS_PEERS = _rivals(
    {
        "eager": loaded(lambda: peers.eager_rms),
        "torch.compile": compiled(loaded(lambda: peers.eager_rms)),
        "apex FusedRMSNorm": loaded(peers.apex_rms),
        "Liger": loaded(peers.liger_rms),
        "flash-attn Triton": loaded(peers.flash_attn_rms),
        "QuACK": loaded(peers.quack_rms),
    },
    functional.rms_norm,
)


def _on_card(
    rows: int, width: int, names: Sequence[str], beside: Mapping[str, Peer], shrink: int, dtypes: Sequence[torch.dtype]
) -> Benchmark:
    """``names``: which of a call's tensors there are beside ``x``; with a ``linear_bias`` goes dropout."""

    def make(fill: InputMaker) -> Arguments:
        own_rows, own_width = max(2, rows // shrink), max(8, width // shrink)
        shapes = {name: (own_rows, own_width) if name == "residual" else (own_width,) for name in names}
        given = {"x": fill.drawn(own_rows, own_width), **{name: fill.drawn(*shape) for name, shape in shapes.items()}}
        return {**given, "dropout_p": DROPOUT, "rng": fill.rng()} if "linear_bias" in names else given

    return Benchmark(make, ("cuda",), dtypes, beside)


def _rows_on_a_card(
    title: str, sizes: Sequence[tuple[int, int]], names: Sequence[str], beside: Mapping[str, Peer], shrink: int
) -> dict[str, Benchmark]:
    """Rows for a GPU; ``shrink`` makes them small, for a trial of the code."""
    rows = {}
    for position, (count, width) in enumerate(sizes):
        dtypes = (torch.bfloat16,) if position else (torch.bfloat16, torch.float32)
        rows[f"{title}{count}x{width}"] = _on_card(count, width, names, beside, shrink, dtypes)
    return rows


def layer_norm(shrink: int = 1) -> dict[str, Benchmark]:
    affine, fused = ("weight", "bias"), ("weight", "bias", "residual", "linear_bias")
    return {
        "residual 8192x768": _on_cpu(8192, 768),
        "residual 2000x128": _on_cpu(2000, 128),
        "bias, dropout, residual 8192x768": _on_cpu(8192, 768, dropout_p=0.1),
        **_rows_on_a_card("bias, dropout 0.1, residual ", FUSED, fused, PEERS, shrink),
        **_rows_on_a_card("", PLAIN, affine, PEERS, shrink),
    }


def rms_norm(shrink: int = 1) -> dict[str, Benchmark]:
    def on_cpu(fill: InputMaker) -> Arguments:
        return {"x": fill.normal(8192, 768), "weight": fill.normal(768), "residual": fill.normal(8192, 768)}

    return {
        "residual 8192x768": Benchmark(on_cpu, ("cpu",), CPU_DTYPES),
        **_rows_on_a_card("residual ", RMS, ("weight", "residual"), RMS_PEERS, shrink),
        **_rows_on_a_card("", RMS[:1], ("weight",), RMS_PEERS, shrink),
    }
