"""Outputs and parameter gradients of two models that must be the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def floats(output: Any) -> dict[str, Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating inputs in a model's dtype."""
    return {**inputs, **{name: value.to(dtype) for name, value in floats(inputs).items()}}


def attention_calls(served: list[tuple[str, str]]) -> list[str]:
    """What served the calls of attention among those recorded."""
    return [impl for op, impl in served if op.startswith("attention")]


def gradients(model: nn.Module, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of all outputs under random weights."""
    generator = torch.Generator().manual_seed(9)
    model.zero_grad()
    differentiable = [value for value in outputs.values() if value.requires_grad]
    sum((value * torch.randn(value.shape, generator=generator)).sum() for value in differentiable).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Tensors of float64 models differ by rounding alone: 1e-9 of the largest entry, or of 1; two ulps where a model takes its
    loss to float32.
    """
    assert found.keys() == expected.keys()
    for name, value in found.items():
        true = expected[name].detach()
        assert value.shape == true.shape and value.dtype == true.dtype, name
        scale = max(1.0, float(true.abs().max()))
        difference = float((value.detach() - true).abs().max()) / scale
        assert difference <= max(1e-9, 2 * torch.finfo(value.dtype).eps), f"{name}: {difference:.1e} of {scale:.1e}"
