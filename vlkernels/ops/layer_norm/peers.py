"""Other people's LayerNorm and RMSNorm. What theirs does not fuse, PyTorch's operators do before it.

Those that must be imported are functions that import them and return the call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.spec import Arguments

EPS, RMS_EPS = 1e-5, 1e-6
Normed = Callable[..., Tensor]


def fused_sum(
    x: Tensor, residual: Tensor | None = None, linear_bias: Tensor | None = None, dropout_p: float = 0.0, rng: Any = None
) -> Tensor:
    """What is normed, one operator after the other; PyTorch draws its own dropout, without ``rng``."""
    if linear_bias is not None:
        x = x + linear_bias
    if dropout_p:
        x = F.dropout(x, dropout_p)
    return x if residual is None else residual + x


def eager(x: Tensor, weight: Tensor, bias: Tensor, **fused: Any) -> Tensor:
    return F.layer_norm(fused_sum(x, **fused), x.shape[-1:], weight, bias, EPS)


def apex_fused() -> Normed:
    """apex's FusedLayerNorm (built with its C++ and CUDA extensions)."""
    affine = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return lambda x, weight, bias, **fused: affine(fused_sum(x, **fused), weight, bias, [x.shape[-1]], EPS)


def apex_fast() -> Normed:
    """apex's contrib FastLayerNorm (an extension of its own), for the widths it lists, 768 and 1024 among them."""
    function = importlib.import_module("apex.contrib.layer_norm.layer_norm").FastLayerNormFN
    return lambda x, weight, bias, **fused: function.apply(fused_sum(x, **fused), weight, bias, EPS)


def liger() -> Normed:
    norm = importlib.import_module("liger_kernel.transformers.functional").liger_layer_norm
    return lambda x, weight, bias, **fused: norm(fused_sum(x, **fused), weight, bias, EPS)


def flash_attn() -> Normed:
    """flash-attn's Triton kernel: dropout and residual too, but no bias of the linear map before them."""
    norm = importlib.import_module("flash_attn.ops.triton.layer_norm").layer_norm_fn

    def call(
        x: Tensor, weight: Tensor, bias: Tensor, linear_bias: Tensor | None = None, rng: Any = None, **fused: Any
    ) -> Tensor:
        return norm(fused_sum(x, linear_bias=linear_bias), weight, bias, **fused, eps=EPS)

    return call


def quack() -> Normed:
    """QuACK's two kernels, which come without autograd, for rows without anything to fuse."""
    kernels = importlib.import_module("quack.rmsnorm")

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y, rstd, mean = kernels.layernorm_fwd(x, weight, bias, EPS, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
            x, weight, rstd, mean = ctx.saved_tensors
            return kernels.layernorm_bwd(x, weight, dy.contiguous(), rstd, mean, has_bias=True)

    return lambda x, weight, bias, **fused: LayerNorm.apply(fused_sum(x, **fused), weight, bias)


def with_float_parameters(arguments: Arguments) -> Arguments:
    """QuACK's LayerNorm takes weight and bias in float32 alone."""
    floats = {name: arguments[name].detach().float().requires_grad_() for name in ("weight", "bias")}
    return {**arguments, **floats}


def eager_rms(x: Tensor, weight: Tensor, **fused: Any) -> Tensor:
    return F.rms_norm(fused_sum(x, **fused), x.shape[-1:], weight, RMS_EPS)


def apex_rms() -> Normed:
    affine = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
    return lambda x, weight, **fused: affine(fused_sum(x, **fused), weight, [x.shape[-1]], RMS_EPS)


def liger_rms() -> Normed:
    """Liger's, or the one that adds a residual, not in place: that writes over the cotangent, which every round reads again."""
    functional = importlib.import_module("liger_kernel.transformers.functional")

    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None, **fused: Any) -> Tensor:
        x = fused_sum(x, **fused)
        if residual is None:
            return functional.liger_rms_norm(x, weight, RMS_EPS, in_place=False)
        return functional.liger_fused_add_rms_norm(x, residual, weight, RMS_EPS, in_place=False)[0]

    return call


def flash_attn_rms() -> Normed:
    norm = importlib.import_module("flash_attn.ops.triton.layer_norm").rms_norm_fn
    return lambda x, weight, residual=None: norm(x, weight, None, residual=residual, eps=RMS_EPS)


def quack_rms() -> Normed:
    norm = importlib.import_module("quack.rmsnorm").rmsnorm
    return lambda x, weight, residual=None: norm(x, weight, residual=residual, eps=RMS_EPS)
