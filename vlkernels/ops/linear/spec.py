"""What the linear map declares about itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlkernels.core.spec import Arguments, Case, Cost, InputMaker, OpSpec
from vlkernels.ops.linear import functional, reference


def _map(fill: InputMaker, *sizes: int, outputs: int, bias: bool = True) -> Arguments:
    scale = max(sizes[-1], 1) ** -0.5
    arguments = {"x": fill.normal(*sizes), "weight": fill.normal(outputs, sizes[-1], scale=scale)}
    return arguments | ({"bias": fill.normal(outputs)} if bias else {})


def _strided(fill: InputMaker) -> Arguments:
    """Rows apart, a transposed weight, a bias with gaps."""
    return {
        "x": fill.normal(29, 70, grad=False)[:, 3:43].requires_grad_(),
        "weight": fill.normal(40, 50, grad=False).T.requires_grad_(),
        "bias": fill.normal(100, grad=False)[::2].requires_grad_(),
    }


def _features(fill: InputMaker) -> Arguments:
    """Data that wants no gradient."""
    return _map(fill, 30, 24, outputs=20) | {"x": fill.normal(30, 24, grad=False)}


CASES = (
    Case("whole_tiles", lambda fill: _map(fill, 48, 64, outputs=96)),
    Case("ragged", lambda fill: _map(fill, 53, 37, outputs=83)),
    Case("deep", lambda fill: _map(fill, 31, 901, outputs=45)),
    Case("wide", lambda fill: _map(fill, 26, 30, outputs=1070)),
    Case("tall", lambda fill: _map(fill, 601, 20, outputs=33)),
    Case("without_bias", lambda fill: _map(fill, 40, 48, outputs=31, bias=False)),
    Case("two_leading", lambda fill: _map(fill, 5, 7, 19, outputs=12)),
    Case("one_row", lambda fill: _map(fill, 64, outputs=40)),
    Case("one_of_each", lambda fill: _map(fill, 1, 1, outputs=1)),
    Case("strided", _strided),
    Case("features", _features),
    Case("no_rows", lambda fill: _map(fill, 0, 16, outputs=8)),
    Case("no_depth", lambda fill: _map(fill, 6, 0, outputs=8)),
    Case("no_outputs", lambda fill: _map(fill, 6, 16, outputs=0)),
)


def _cost(x: Tensor, weight: Tensor, **_: Any) -> Cost:
    product = 2 * x.numel() * weight.shape[0]
    y = x.numel() // max(x.shape[-1], 1) * weight.shape[0]
    moved = (x.numel() + weight.numel() + y) * x.element_size()
    return Cost(
        forward_bytes=moved, backward_bytes=2 * moved, forward_flops=product, backward_flops=2 * product
    )


SPECS = (
    OpSpec(
        name="linear",
        functional=functional.linear,
        reference=reference.linear,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        dtypes=(torch.float32,),
        benchmarks={
            "quickstart_t3000_128_to_512": lambda fill: _map(fill, 3000, 128, outputs=512),
            "bert_t1830_768_to_2304": lambda fill: _map(fill, 1830, 768, outputs=2304),
            "bert_t1830_3072_to_768": lambda fill: _map(fill, 1830, 3072, outputs=768),
        },
        peers={"torch": F.linear},
        cost=_cost,
    ),
)
