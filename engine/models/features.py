"""Features of unit length: what contrastive scores compare, and what multiplies these."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from engine.sections.roles import Projection


class FeatureHead(nn.Module):
    """A linear map of what stands for a picture or a text, and unit length."""

    def __init__(self, width: int, features: int, projection: Projection):
        super().__init__()
        if projection == "none" and width != features:
            raise ValueError(f"model.projection_dim must be {width} where a tower of that width has no projection, got {features}")
        self.projection = None if projection == "none" else nn.Linear(width, features, bias=projection == "affine")

    def forward(self, pooled: Tensor) -> Tensor:
        return F.normalize(pooled if self.projection is None else self.projection(pooled), dim=-1)


def scale_within(logarithm: Tensor, smallest: float, largest: float) -> Tensor:
    """What multiplies similarities: the exponential of a parameter, within limits.

    Past a limit a gradient still arrives if the step it asks for leads back: behind a plain clamp the parameter would stay
    there for ever.
    """
    return _Within.apply(logarithm, math.log(smallest), math.log(largest)).exp()


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, least: float, most: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = least, most
        return x.clamp(least, most)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (least, most) = ctx.saved_tensors, ctx.limits
        leads_out = ((x > most) & (grad < 0)) | ((x < least) & (grad > 0))
        return grad.masked_fill(leads_out, 0), None, None
