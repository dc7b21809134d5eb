"""Batch normalisation over the batches of all ranks, and one that stands still."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from engine.models.states import Float32Buffers, num_ranks, rows_of_ranks, sum_over_ranks
from engine.sections import require


class FrozenBatchNorm(Float32Buffers):
    """`[N, channels, ...]` by statistics and a map that nothing changes: what detection backbones are loaded with."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        return x * over_channels(scale, x).to(x.dtype) + over_channels(shift, x).to(x.dtype)


class BatchNorm(Float32Buffers):
    """`[N, channels, ...]` by the statistics of a micro-step's batches on all ranks: those of one process on the
    concatenated batch. torch's SyncBatchNorm computes the same on GPUs alone.

    Names are torch's. The running statistics move after the step, by those of each reading that had a graph.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            mean, var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
            return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        values = num_ranks() * x.numel() // x.shape[1]
        require(values > 1, f"a batch norm needs more than one value of each channel, got {values}: give more samples a step")
        normalised, mean, var, count = _Normalise.apply(x, self.eps)
        if torch.is_grad_enabled():
            self._seen.append((mean.flatten(), var.flatten() * (count / (count - 1))))
        return normalised * over_channels(self.weight, x) + over_channels(self.bias, x)

    @torch.no_grad()
    def after_step(self, applied: bool) -> None:
        seen, self._seen = self._seen, []
        for mean, var in seen if applied else ():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)


def over_channels(values: Tensor, x: Tensor) -> Tensor:
    """`[channels]` against `[N, channels, ...]`."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


class _Normalise(torch.autograd.Function):
    """(x - mean) * rsqrt(var + eps) over all but the channels, of all ranks; the mean, the biased variance, the count."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = _statistics(wide, others(x))
        deviation = torch.sqrt(var + eps)
        normalised = (wide - mean) / deviation
        ctx.save_for_backward(normalised, deviation, count)
        ctx.mark_non_differentiable(mean, var, count)
        ctx.dtype = x.dtype
        return normalised.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        normalised, deviation, count = ctx.saved_tensors
        grad = grad.to(normalised.dtype)
        dims = others(grad)
        sums = torch.stack((grad.sum(dims, keepdim=True), (grad * normalised).sum(dims, keepdim=True)))
        mean_grad, mean_product = sum_over_ranks(sums) / count
        return ((grad - mean_grad - normalised * mean_product) / deviation).to(ctx.dtype), None


def others(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [dim for dim in range(x.dim()) if dim != 1]


def _statistics(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel and the number of values behind them. The ranks' own are put together, so
    that no large sum of squares loses a small variance."""
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    count = x.new_full((1,), x.numel() / x.shape[1])
    if num_ranks() == 1:
        return mean, var, count
    found = rows_of_ranks(torch.cat((mean.flatten(), var.flatten(), count))[None])
    counts = found[:, -1:]
    means, variances = found[:, :-1].chunk(2, dim=1)
    total = counts.sum()
    shares = counts / total
    mean_of_all = (shares * means).sum(0)
    var_of_all = (shares * (variances + (means - mean_of_all).square())).sum(0)
    return mean_of_all.view_as(mean), var_of_all.view_as(var), total.view(1)
