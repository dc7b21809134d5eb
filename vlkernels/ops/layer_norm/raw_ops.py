"""The raw ops of ``vk.layer_norm`` and ``vk.rms_norm``: schemas, fakes and their one backward.

RMSNorm is a LayerNorm that is not centered: it has no ``mean`` and no ``bias``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import library


def fuses(residual: Tensor | None, linear_bias: Tensor | None, row_scale: Tensor | None, threshold: int) -> bool:
    """Whether ``z`` is another tensor than ``x``."""
    return residual is not None or linear_bias is not None or row_scale is not None or threshold > 0


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    linear_bias: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    keys: Tensor | None,
    stream: int,
    threshold: int,
    eps: float,
    keep_sum: bool,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = keep_sum and fuses(residual, linear_bias, row_scale, threshold)
    rstd = x.new_empty((math.prod(x.shape[:-1]),), dtype=torch.float32)
    mean = torch.empty_like(rstd) if centered else rstd.new_empty((0,))
    return torch.empty_like(x), torch.empty_like(x) if kept else x.new_empty((0,)), mean, rstd


def _backward_fake(
    dy: Tensor,
    dsum: Tensor | None,
    z: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    linear_bias: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    keys: Tensor | None,
    stream: int,
    threshold: int,
) -> tuple[Tensor, ...]:
    dx_differs = row_scale is not None or threshold > 0
    sums = (
        z.new_empty((0,), dtype=torch.float32) if p is None else torch.empty_like(p)
        for p in (weight, bias, linear_bias)
    )
    return torch.empty_like(z), torch.empty_like(z) if dx_differs else z.new_empty((0,)), *sums


_forward = library.define(
    "layer_norm_forward(Tensor x, Tensor? residual, Tensor? linear_bias, Tensor? row_scale, Tensor? weight, "
    "Tensor? bias, Tensor? rng_state, Tensor? keys, SymInt stream, int threshold, float eps, bool keep_sum, "
    "bool centered) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
_backward = library.define_backward(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor z, Tensor? mean, Tensor rstd, Tensor? linear_bias, "
    "Tensor? row_scale, Tensor? weight, Tensor? bias, Tensor? rng_state, Tensor? keys, SymInt stream, "
    "int threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, linear_bias, row_scale, weight, bias, rng_state, keys, stream, threshold, _, _, centered = inputs
    _, z, mean, rstd = output
    saved = z if fuses(residual, linear_bias, row_scale, threshold) else x
    ctx.save_for_backward(saved, mean if centered else None, rstd, linear_bias, row_scale, weight, bias, rng_state, keys)
    ctx.stream, ctx.threshold = stream, threshold
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    z, mean, rstd, linear_bias, row_scale, weight, bias, rng_state, keys = ctx.saved_tensors
    dy = torch.zeros_like(z) if dy is None else dy.contiguous()
    dsum = (
        dsum.contiguous() if dsum is not None and dsum.shape == z.shape else None
    )  # without a sum: an empty tensor's
    dz, dx, dweight, dbias, dlinear_bias = _backward(
        dy,
        dsum,
        z,
        mean,
        rstd,
        linear_bias,
        row_scale,
        weight,
        bias,
        rng_state,
        keys,
        ctx.stream,
        ctx.threshold,
    )
    wants = ctx.needs_input_grad
    return (
        (dx if row_scale is not None or ctx.threshold else dz) if wants[0] else None,
        dz if wants[1] else None,
        dlinear_bias if wants[2] else None,
        None,
        dweight if wants[4] else None,
        dbias if wants[5] else None,
        *[None] * 7,
    )


normalise = library.differentiable(_forward, setup_context=_setup_context, backward=_differentiate, returned=2)
