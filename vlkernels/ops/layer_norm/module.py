"""``vk.FusedLayerNorm`` and ``vk.FusedRMSNorm``: replace ``nn.LayerNorm`` and ``nn.RMSNorm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlkernels.ops.layer_norm.functional import layer_norm, rms_norm

PER_COLUMN = ("x", "residual", "linear_bias", "weight", "bias")  # they end in normalized_shape


class FusedLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` (constructor, state dict, autocast); its call also takes what ``vk.layer_norm`` fuses.

    Example:
        >>> import torch, vlkernels as vk
        >>> norm = vk.FusedLayerNorm(32)
        >>> x, residual = torch.randn(5, 32), torch.randn(5, 32)
        >>> torch.testing.assert_close(norm(x, residual=residual), torch.nn.LayerNorm(32)(x + residual))
    """

    def forward(self, input: Tensor, **fused: Any) -> Tensor | tuple[Tensor, Tensor]:
        """LayerNorm over ``normalized_shape``; ``fused`` are the keyword arguments of ``vk.layer_norm``."""
        arguments = {"x": input, "weight": self.weight, "bias": self.bias, "eps": self.eps, **fused}
        return over_shape(layer_norm, self.normalized_shape, as_autocast_does(arguments))


class FusedRMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` (constructor, state dict, autocast); its call also takes what ``vk.rms_norm`` fuses.

    Example:
        >>> import torch, vlkernels as vk
        >>> norm = vk.FusedRMSNorm(32, eps=1e-6)
        >>> x, residual = torch.randn(5, 32), torch.randn(5, 32)
        >>> torch.testing.assert_close(norm(x, residual=residual), torch.nn.RMSNorm(32, eps=1e-6)(x + residual))
    """

    def forward(self, x: Tensor, **fused: Any) -> Tensor | tuple[Tensor, Tensor]:
        """RMSNorm over ``normalized_shape``; ``fused`` are the keyword arguments of ``vk.rms_norm``."""
        eps = self.eps
        if eps is None:  # PyTorch's: that of the dtype in which it computes
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        arguments = {"x": x, "weight": self.weight, "eps": eps, **fused}
        return over_shape(rms_norm, self.normalized_shape, as_autocast_does(arguments))


def over_shape(norm: Callable[..., Any], shape: tuple[int, ...], arguments: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    """``norm`` over the last dimensions, which are ``shape``."""
    x, dims = arguments["x"], len(shape)
    if x.shape[-dims:] != shape:
        raise ValueError(f"x must be [..., {', '.join(map(str, shape))}], got {list(x.shape)}")
    if dims == 1:
        return norm(**arguments)
    flat = {name: _flatten(value, dims) if name in PER_COLUMN else value for name, value in arguments.items()}
    output = norm(**flat)
    return tuple(t.view(x.shape) for t in output) if isinstance(output, tuple) else output.view(x.shape)


def _flatten(value: Tensor | None, dims: int) -> Tensor | None:
    return value if value is None or value.dim() < dims else value.flatten(-dims)


def as_autocast_does(arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """PyTorch's autocast runs both norms in float32 on CUDA, float64 aside. On the CPU it leaves them alone: there a sum of
    two dtypes is of the wider one."""
    if torch.is_autocast_enabled("cuda"):
        return {name: value.to(dtype) if _is_cast(value) else value for name, value in arguments.items()}
    x, residual = arguments["x"], arguments.get("residual")
    if residual is None or not torch.is_autocast_enabled("cpu"):
        return arguments
    wider = torch.promote_types(x.dtype, residual.dtype)
    return {**arguments, "x": x.to(wider), "residual": residual.to(wider)}


def _is_cast(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda and value.is_floating_point() and value.dtype != torch.float64
