"""The residual branch of every row for itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.models.dropout import drop
from engine.models.transformer.attention import Sublayer
from engine.models.transformer.maps import Linear
from engine.models.transformer.tokens import Context
from engine.sections import Stack

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


class FeedForward(Sublayer):
    """Two linear maps around a non-linearity, whose values a third map may multiply (gated)."""

    def __init__(self, stack: Stack, streams: Iterator[int], impl: str):
        super().__init__(stack, stack.mlp_width, streams, impl)
        self.gated = stack.gated
        inner_width = 2 * stack.mlp_width if stack.gated else stack.mlp_width
        self.inner = Linear(stack.width, inner_width, impl, stack.biases != "none")
        self.activation = ACTIVATIONS[stack.activation]
        self.activation_dropout = stack.activation_dropout
        if self.activation_dropout > 0:
            self.sites = 2
            self.activation_stream = next(streams)

    def forward(self, x: Tensor, context: Context, _: None = None) -> Tensor:
        hidden = self.inner(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=1)
            return self.output(self._drop(self.activation(gate) * value, context))
        return self.output(self._drop(self.activation(hidden), context))

    def _drop(self, hidden: Tensor, context: Context) -> Tensor:
        if not self.training or self.activation_dropout == 0:
            return hidden
        stream = self.activation_stream + context.stream_offset
        return drop(hidden, self.activation_dropout, context.layout, context.rng, stream, self.impl)
