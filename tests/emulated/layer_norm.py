"""The CUDA kernels of layer_norm in the emulator, called as ``csrc/binding/layer_norm.cpp`` calls them on a card."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests import emulated
from tests.emulated import CSRC, fields
from vlkernels.ops.layer_norm import functional


def kernels() -> ModuleType:
    return emulated.module(CSRC / "emulator" / "layer_norm.cpp")


def forward(
    x, residual, linear_bias, row_scale, weight, bias, rng_state, keys, stream, threshold, eps, keep_sum, centered
) -> tuple[Tensor, ...]:
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    fused = residual is not None or linear_bias is not None or row_scale is not None or threshold > 0
    y, rstd = torch.empty_like(x), x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)
    mean = torch.empty_like(rstd) if centered else rstd.new_empty(0)
    z = torch.empty_like(x) if fused and keep_sum else x.new_empty(0)
    kernels().forward(
        fields(
            dtype=x.dtype, width=width, rows=rows, eps=eps, x=x, residual=residual, linear_bias=(linear_bias,),
            weight=(weight,), bias=(bias,), row_scale=row_scale, rng_state=rng_state, keys=keys, stream=stream,
            threshold=threshold, y=y, z=z if fused and keep_sum else None, mean=mean if centered else None, rstd=rstd,
        )
    )  # fmt: skip
    return y, z, mean, rstd


def backward(
    dy, dsum, z, mean, rstd, linear_bias, row_scale, weight, bias, rng_state, keys, stream, threshold
) -> tuple[Tensor, ...]:
    width = z.shape[-1]
    rows = z.numel() // width if width else 0
    dx_differs = row_scale is not None or threshold > 0
    dz, dx = torch.empty_like(z), torch.empty_like(z) if dx_differs else z.new_empty(0)
    dweight, dbias, dlinear_bias = (None if p is None else torch.empty_like(p) for p in (weight, bias, linear_bias))
    call = fields(
        dtype=z.dtype, width=width, rows=rows, dy=dy, dsum=dsum, z=z, mean=mean, rstd=rstd, weight=(weight,),
        row_scale=row_scale, rng_state=rng_state, keys=keys, stream=stream, threshold=threshold, dz=dz,
        dx=dx if dx_differs else None, dweight=(dweight,), dbias=(dbias,), dlinear_bias=(dlinear_bias,),
    )  # fmt: skip
    partials = torch.full((kernels().partial_rows(call), 3, width), float("nan"))
    kernels().backward({**call, **fields(partials=partials)})
    gradients = (z.new_empty(0, dtype=torch.float32) if g is None else g for g in (dweight, dbias, dlinear_bias))
    return dz, dx, *gradients


def serving(monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    """``impl="cuda"`` of layer_norm serves CPU tensors inside the block."""
    return emulated.serving(monkeypatch, functional, {"layer_norm_forward": forward, "layer_norm_backward": backward})
