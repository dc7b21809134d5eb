"""Linear maps and norms that the sub-layers are made of."""

from __future__ import annotations

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.models.transformer.tokens import SelectedRows
from engine.sections import Stack

Norm = vk.FusedLayerNorm | vk.FusedRMSNorm


def norm_of(stack: Stack) -> Norm:
    """A norm over the width of a stack."""
    kind = {"layer": vk.FusedLayerNorm, "rms": vk.FusedRMSNorm}[stack.norm_kind]
    return kind(stack.width, stack.eps)


class Linear(nn.Linear):
    """`nn.Linear` by `vk.linear`."""

    def __init__(self, in_features: int, out_features: int, impl: str, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        return vk.linear(x, self.weight, self.bias, impl=self.impl)


class DeferredBiasLinear(Linear):
    """A linear map whose bias is left to the fused add-and-norm behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return vk.linear(x, self.weight, impl=self.impl)


class QueryKeyValue(Linear):
    """The three projections of self-attention in one map."""

    def __init__(self, stack: Stack, impl: str):
        super().__init__(stack.width, 3 * stack.width, impl, bias=stack.biases != "none")
        self.biases_keys = stack.biases != "no_key"
        if not self.biases_keys:
            self.bias = nn.Parameter(torch.zeros(2 * stack.width))

    def forward(self, x: Tensor, selected: SelectedRows | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """`[T, 3 D]`, or, where only some rows ask, their queries `[M, D]` beside the keys and values `[T, 2 D]` of all."""
        bias = self._bias()
        if selected is None:
            return vk.linear(x, self.weight, bias, impl=self.impl)
        parts = x.shape[1], 2 * x.shape[1]
        biases = (None, None) if bias is None else bias.split(parts)
        rows = vk.take_rows(x, selected.index, impl=self.impl)
        return tuple(
            vk.linear(read, weight, own_bias, impl=self.impl)
            for read, weight, own_bias in zip((rows, x), self.weight.split(parts), biases, strict=True)
        )

    def _bias(self) -> Tensor | None:
        if self.bias is None or self.biases_keys:
            return self.bias
        query, value = self.bias.chunk(2)
        return torch.cat((query, torch.zeros_like(query), value))
