"""``vk.FusedLayerNorm``: replaces ``nn.LayerNorm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlkernels.ops.layer_norm.functional import layer_norm


class FusedLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` (constructor, state dict, autocast); its call also takes what ``vk.layer_norm`` fuses.

    Example:
        >>> import torch, vlkernels as vk
        >>> norm = vk.FusedLayerNorm(32)
        >>> x, residual = torch.randn(5, 32), torch.randn(5, 32)
        >>> torch.testing.assert_close(norm(x, residual=residual), torch.nn.LayerNorm(32)(x + residual))
    """

    def forward(self, x: Tensor, **fused: Any) -> Tensor | tuple[Tensor, Tensor]:
        """LayerNorm over ``normalized_shape``; ``fused`` are the keyword arguments of ``vk.layer_norm``."""
        shape = self.normalized_shape
        if x.shape[-len(shape) :] != shape:
            raise ValueError(f"x must be [..., {', '.join(map(str, shape))}], got {list(x.shape)}")
        fused = {"eps": self.eps, **_as_autocast_does(fused)}
        x = _as_autocast_does({"x": x})["x"]
        if len(shape) == 1:
            return layer_norm(x, self.weight, self.bias, **fused)
        flat = {
            name: _flatten(value, len(shape)) if name in ("x", "residual", "linear_bias") else value
            for name, value in {"x": x, **fused}.items()
        }
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        output = layer_norm(weight=weight, bias=bias, **flat)
        return tuple(t.view(x.shape) for t in output) if isinstance(output, tuple) else output.view(x.shape)


def _flatten(value: Tensor | None, dims: int) -> Tensor | None:
    return None if value is None else value.flatten(-dims)


def _as_autocast_does(arguments: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's autocast runs LayerNorm in float32 on CUDA and leaves it alone on the CPU."""
    if not torch.is_autocast_enabled("cuda"):
        return arguments
    return {
        name: value.float()
        if isinstance(value, Tensor) and value.is_cuda and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
