"""What the contract tests and the benchmarks know about ``layer_norm`` and ``rms_norm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.spec import Arguments, Case, Cost, InputMaker, OpSpec
from vlkernels.ops.layer_norm import functional, reference


def _plain(fill: InputMaker) -> Arguments:
    return {"x": fill.normal(7, 48), "weight": fill.normal(48), "bias": fill.normal(48)}


def _bare(fill: InputMaker) -> Arguments:
    return {"x": fill.normal(3, 4, 33), "weight": None, "bias": None, "eps": 1e-3}


def _residual(fill: InputMaker) -> Arguments:
    return {**_plain(fill), "residual": fill.normal(7, 48), "return_sum": True}


def _everything(fill: InputMaker) -> Arguments:
    layout = fill.layout([[5, 3], [0, 7], [4, 0]], capacity=24, sample_ids=[11, 3, 500])
    rows, width = layout.num_tokens, 77
    return {
        "x": fill.normal(rows, width),
        "weight": fill.normal(width, dtype=torch.float32),
        "bias": fill.normal(width, dtype=torch.float32),
        "residual": fill.normal(rows, width),
        "linear_bias": fill.normal(width),
        "dropout_p": 0.25,
        "row_scale": fill.normal(rows, grad=False, dtype=torch.float32),
        "rng": fill.rng(),
        "stream": 3,
        "layout": layout,
        "return_sum": True,
    }


def _dropout(fill: InputMaker) -> Arguments:
    return {
        "x": fill.normal(2, 35, 64),
        "weight": fill.normal(64),
        "bias": None,
        "linear_bias": fill.normal(64),
        "dropout_p": 0.1,
        "rng": fill.rng(),
    }


def _row_scale(fill: InputMaker) -> Arguments:
    scale = fill.integers(0, 2, (9,)).to(torch.float32)
    return {**_plain(fill), "x": fill.normal(9, 48), "residual": fill.normal(9, 48), "row_scale": scale}


def _large_mean(fill: InputMaker) -> Arguments:
    x = (fill.normal(40, 48, grad=False) + 64).requires_grad_()
    return {"x": x, "weight": fill.normal(48), "bias": fill.normal(48)}


CASES = (
    Case("plain", _plain),
    Case("bare", _bare),
    Case("residual", _residual),
    Case("everything", _everything),
    Case("dropout", _dropout),
    Case("row_scale", _row_scale),
    Case("large_mean", _large_mean),
)


def without_bias(case: Case) -> Case:
    """The case for ``rms_norm``."""

    def make(fill: InputMaker) -> Arguments:
        arguments = case.make(fill)
        del arguments["bias"]
        return arguments

    return Case(case.name, make)


def _benchmark(rows: int, width: int, **options: float) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        data = {name: fill.normal(rows, width) for name in ("x", "residual")}
        parameters = {name: fill.normal(width) for name in ("weight", "bias")}
        if options:
            parameters["linear_bias"] = fill.normal(width)
        return {**data, **parameters, **options}

    return make


def _eager(x: Tensor, weight: Tensor, bias: Tensor, **fused: Any) -> Tensor:
    """The same in plain PyTorch, with PyTorch's own dropout."""
    if "linear_bias" in fused:
        x = x + fused["linear_bias"]
    x = F.dropout(x, fused.get("dropout_p", 0.0), training="dropout_p" in fused)
    return F.layer_norm(fused["residual"] + x, x.shape[-1:], weight, bias)


def _benchmark_rms(fill: InputMaker) -> Arguments:
    return {"x": fill.normal(8192, 768), "weight": fill.normal(768), "residual": fill.normal(8192, 768)}


def _eager_rms(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return F.rms_norm(residual + x, x.shape[-1:], weight, 1e-6)


def _cost(x: Tensor, **_: Any) -> Cost:
    unit = x.numel() * x.element_size()
    return Cost(forward_bytes=4 * unit, backward_bytes=3 * unit)


SPECS = (
    OpSpec(
        name="layer_norm",
        functional=functional.layer_norm,
        reference=reference.layer_norm,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        benchmarks={
            "residual 8192x768": _benchmark(8192, 768),
            "residual 2000x128": _benchmark(2000, 128),
            "bias, dropout, residual 8192x768": _benchmark(8192, 768, dropout_p=0.1),
        },
        peers={"eager": _eager},
        cost=_cost,
    ),
    OpSpec(
        name="rms_norm",
        functional=functional.rms_norm,
        reference=reference.rms_norm,
        implementations=functional.IMPLEMENTATIONS,
        cases=tuple(without_bias(case) for case in CASES),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        benchmarks={"residual 8192x768": _benchmark_rms},
        peers={"eager": _eager_rms},
        cost=_cost,
    ),
)
