"""What ``layer_norm`` is timed on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlkernels.core.peers import Build, compiled, loaded, rival
from vlkernels.core.spec import Arguments, Benchmark, Cost, InputMaker, Peer
from vlkernels.ops.layer_norm import functional, peers

# (rows, width), the most telling first, which is also timed in float32
FUSED = ((65_536, 768), (16_384, 768), (4_096, 768), (131_072, 768), (16_384, 1024), (65_536, 1024), (131_072, 1024))
PLAIN = ((65_536, 768), (16_384, 768), (4_096, 768), (65_536, 1024), (131_072, 1024))
DROPOUT = 0.1


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

    return Benchmark(make, ("cpu",))


def on_a_cpu() -> dict[str, Benchmark]:
    return {
        "residual 8192x768": _on_cpu(8192, 768),
        "residual 2000x128": _on_cpu(2000, 128),
        "bias, dropout, residual 8192x768": _on_cpu(8192, 768, dropout_p=0.1),
    }


def _rival(build: Build) -> Peer:
    return rival(build, functional.layer_norm)


ANY_ROW = {
    "eager": _rival(loaded(lambda: peers.eager)),
    "torch.compile": _rival(compiled(loaded(lambda: peers.eager))),
    "apex FusedLayerNorm": _rival(loaded(peers.apex_fused)),
    "apex FastLayerNorm": _rival(loaded(peers.apex_fast)),
    "Liger": _rival(loaded(peers.liger)),
    "flash-attn Triton": _rival(loaded(peers.flash_attn)),
    "QuACK": _rival(loaded(peers.quack, peers.with_float_parameters)),
}


def on_a_card(shrink: int = 1) -> dict[str, Benchmark]:
    """The rows for a GPU; ``shrink`` makes them small, for a trial of the code."""
    rows = {}
    for fused, sizes in ((True, FUSED), (False, PLAIN)):
        for position, (count, width) in enumerate(sizes):
            name = f"{'bias, dropout 0.1, residual ' if fused else ''}{count}x{width}"
            dtypes = (torch.bfloat16,) if position else (torch.bfloat16, torch.float32)
            rows[name] = _on_card(max(2, count // shrink), max(8, width // shrink), fused, dtypes)
    return rows


def _on_card(rows: int, width: int, fused: bool, dtypes: tuple[torch.dtype, ...]) -> Benchmark:
    def make(fill: InputMaker) -> Arguments:
        plain = {"x": fill.drawn(rows, width), "weight": fill.drawn(width), "bias": fill.drawn(width)}
        if not fused:
            return plain
        return {
            **plain,
            "residual": fill.drawn(rows, width),
            "linear_bias": fill.drawn(width),
            "dropout_p": DROPOUT,
            "rng": fill.rng(),
        }

    return Benchmark(make, ("cuda",), dtypes, ANY_ROW)


def layer_norm() -> dict[str, Benchmark]:
    return {**on_a_cpu(), **on_a_card()}
