"""The norms of apex over ``vk.layer_norm`` and ``vk.rms_norm``: its constructors, state dicts, dtypes and autocast.

apex differs from PyTorch in three ways. Under autocast its norms run in autocast's own dtype, parameters too, and return it.
The ``Mixed`` ones return the dtype of their parameters, the others that of their input. And ``memory_efficient`` makes apex keep
the output in place of the input; here it is taken and shown to readers of the attribute, and the input is kept either way.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from vlkernels.ops.layer_norm import layer_norm, rms_norm
from vlkernels.ops.layer_norm.module import as_autocast_does, over_shape

Shape = int | list[int] | tuple[int, ...] | torch.Size


class FusedLayerNorm(nn.LayerNorm):
    """``apex.normalization.FusedLayerNorm``.

    Example::

        norm = vk.integrations.apex.FusedLayerNorm(768, eps=1e-12)
    """

    def __init__(
        self, normalized_shape: Shape, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ):
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        arguments = {"x": input, "weight": self.weight, "bias": self.bias, "eps": self.eps}
        return over_shape(layer_norm, self.normalized_shape, _cast(arguments))


class FusedRMSNorm(nn.RMSNorm):
    """``apex.normalization.FusedRMSNorm``, as :class:`FusedLayerNorm`."""

    def __init__(
        self, normalized_shape: Shape, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ):
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        arguments = {"x": input, "weight": self.weight, "eps": self.eps}
        return over_shape(rms_norm, self.normalized_shape, _cast(arguments))


class MixedFusedLayerNorm(FusedLayerNorm):
    """``apex.normalization.MixedFusedLayerNorm``: it returns the dtype of its parameters."""

    def __init__(self, normalized_shape: Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **others: Any):
        _check_affine(type(self), others)
        super().__init__(normalized_shape, eps, memory_efficient=memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        arguments = _cast({"x": input, "weight": self.weight, "bias": self.bias})
        wide = _in_one_dtype(arguments)
        return over_shape(layer_norm, self.normalized_shape, {**wide, "eps": self.eps}).to(arguments["weight"].dtype)


class MixedFusedRMSNorm(FusedRMSNorm):
    """``apex.normalization.MixedFusedRMSNorm``: it returns the dtype of its weight."""

    def __init__(self, normalized_shape: Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **others: Any):
        _check_affine(type(self), others)
        super().__init__(normalized_shape, eps, memory_efficient=memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        arguments = _cast({"x": input, "weight": self.weight})
        wide = _in_one_dtype(arguments)
        return over_shape(rms_norm, self.normalized_shape, {**wide, "eps": self.eps}).to(arguments["weight"].dtype)


def _cast(arguments: dict[str, Any]) -> dict[str, Any]:
    return as_autocast_does(arguments, torch.get_autocast_dtype("cuda"))


def _in_one_dtype(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All in the least dtype that holds them, so that nothing is rounded before the end."""
    wide = torch.promote_types(tensors["x"].dtype, tensors["weight"].dtype)
    return {name: tensor.to(wide) for name, tensor in tensors.items()}


def _check_affine(kind: type[nn.Module], others: dict[str, Any]) -> None:
    unknown = others.keys() - {"elementwise_affine"}
    if unknown:
        raise TypeError(f"{kind.__name__} got an unexpected keyword argument {sorted(unknown)[0]!r}")
    if not others.get("elementwise_affine", True):
        raise RuntimeError(f"{kind.__name__} does not support elementwise_affine=False")
    if others:
        warnings.warn(f"{kind.__name__} always has parameters: elementwise_affine says nothing", stacklevel=3)
