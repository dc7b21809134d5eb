"""The transformer everybody writes: padded batches, `scaled_dot_product_attention`, `nn.LayerNorm`.

Parameters are named as in the engine's packed transformer, so one's weights load into the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.sections import Stack

CAUSAL = "causal"
"""In the place of a mask: a token sees those before it. What is padded behind a sample is then seen by nobody in it."""


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "quick_gelu": QuickGelu()}


class Residual(nn.Module):
    """A branch that adds to its input, normalised before it (pre) or with the sum (post)."""

    def __init__(self, stack: Stack, inner_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(stack.width, stack.eps)
        self.output = nn.Linear(inner_width, stack.width)
        self.dropout = nn.Dropout(stack.dropout)
        self.post = stack.norm == "post"

    def add_to(self, x: Tensor, *context) -> Tensor:
        if self.post:
            return self.norm(x + self.dropout(self(x, *context)))
        return x + self.dropout(self(self.norm(x), *context))


class Attention(Residual):
    def __init__(self, stack: Stack, source_width: int | None = None):
        super().__init__(stack, stack.width)
        if source_width is None:
            self.query_key_value = nn.Linear(stack.width, 3 * stack.width)
        else:
            self.query = nn.Linear(stack.width, stack.width)
            self.key_value = nn.Linear(source_width, 2 * stack.width)
        self.heads = stack.heads
        self.attention_dropout = stack.attention_dropout

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        batch, length, _ = x.shape
        return x.view(batch, length, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        dropped = self.attention_dropout if self.training else 0.0
        seen = {"is_causal": True} if visible is CAUSAL else {"attn_mask": visible}
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropped, **seen)
        return self.output(attended.transpose(1, 2).flatten(2))

    def forward(
        self, x: Tensor, visible: Tensor | None, keys_values: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        if keys_values is None:
            return self.attend(*self.split(self.query_key_value(x), 3), visible)
        return self.attend(*self.split(self.query(x), 1), *keys_values, visible)


class FeedForward(Residual):
    def __init__(self, stack: Stack):
        super().__init__(stack, stack.mlp_width)
        self.inner = nn.Linear(stack.width, stack.mlp_width)
        self.activation = ACTIVATIONS[stack.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.inner(x)))


class Block(nn.Module):
    def __init__(self, stack: Stack, source_width: int | None):
        super().__init__()
        self.self_attention = Attention(stack)
        self.cross_attention = None if source_width is None else Attention(stack, source_width)
        self.feed_forward = FeedForward(stack)

    def forward(
        self, x: Tensor, visible: Tensor | None, keys_values=None, source_visible: Tensor | None = None
    ) -> Tensor:
        x = self.self_attention.add_to(x, visible)
        if self.cross_attention is not None:
            x = self.cross_attention.add_to(x, source_visible, keys_values)
        return self.feed_forward.add_to(x)


class Transformer(nn.Module):
    def __init__(self, stack: Stack, source_width: int | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(stack, source_width) for _ in range(stack.layers))
        self.final_norm = nn.LayerNorm(stack.width, stack.eps) if stack.norm == "pre" else None

    def project_source(self, source: Tensor) -> list[tuple[Tensor, ...]]:
        return [b.cross_attention.split(b.cross_attention.key_value(source), 2) for b in self.blocks]

    def forward(
        self, x: Tensor, visible: Tensor | None, source=None, source_visible: Tensor | None = None
    ) -> Tensor:
        for block, keys_values in zip(self.blocks, source or [None] * len(self.blocks), strict=True):
            x = block(x, visible, keys_values, source_visible)
        return x if self.final_norm is None else self.final_norm(x)


class HeadTransform(nn.Module):
    """BERT's: linear map, activation, LayerNorm."""

    def __init__(self, stack: Stack):
        super().__init__()
        self.transform = nn.Linear(stack.width, stack.width)
        self.activation = ACTIVATIONS[stack.activation]
        self.norm = nn.LayerNorm(stack.width, stack.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.transform(x)))


class TiedHead(HeadTransform):
    """Decodes with a matrix `[out, D]` that is another layer's, and a bias of its own."""

    def __init__(self, stack: Stack, values: int):
        super().__init__(stack)
        self.bias = nn.Parameter(torch.zeros(values))

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(super().forward(x), matrix, self.bias)


def padding_mask(lengths: Tensor, longest: int) -> Tensor:
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def attention_mask(real: Tensor) -> Tensor | None:
    """Broadcast over heads and queries; none where nothing is padded, which lets attention take its fast
    road."""
    return None if bool(real.all()) else real[:, None, None]
