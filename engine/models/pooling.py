"""Pooling: one row for every sample of a stream."""

from __future__ import annotations

from typing import Literal

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.models.embedding.rows import table
from engine.models.transformer import ACTIVATIONS, Linear, Tokens
from engine.sections import Stack

Kind = Literal["first", "last", "mean", "attention", "pooler"]


class Pooling(nn.Module):
    """first, last: that token of the sample; mean: of a segment's tokens; attention: one learned query's (SigLIP);
    pooler: a linear map and tanh of the first (BERT)."""

    def __init__(self, kind: Kind, stack: Stack, impl: str):
        super().__init__()
        self.kind, self.impl = kind, impl
        self.attention = AttentionPooling(stack, impl) if kind == "attention" else None
        self.dense = nn.Linear(stack.width, stack.width) if kind == "pooler" else None

    def forward(self, tokens: Tokens, segment: int = 0) -> Tensor:
        """`[B, D]`; `segment` is whose mean is taken."""
        if self.attention is not None:
            return self.attention(tokens)
        if self.kind == "mean":
            return vk.segment_mean(tokens.hidden, tokens.layout, segment, impl=self.impl)
        row = self._row(tokens.layout)
        picked = vk.take_rows(tokens.hidden, row, impl=self.impl)
        return picked if self.dense is None else torch.tanh(self.dense(picked))

    def _row(self, layout: vk.SegmentLayout) -> Tensor:
        """int32 `[B]`: the first or last row of each sample; -1 where it is empty."""
        length = layout.lengths.sum(1, dtype=torch.int32)
        behind = length - 1 if self.kind == "last" else torch.zeros_like(length)
        return torch.where(length > 0, layout.starts[:, 0] + behind, -1)


class AttentionPooling(nn.Module):
    """A learned query attends to all tokens of its sample; a feed-forward network behind a norm is added to what it
    found. The query itself is not, and nothing is dropped."""

    def __init__(self, stack: Stack, impl: str):
        super().__init__()
        width = stack.width
        self.probe = table(1, width)
        self.query, self.key_value = nn.Linear(width, width), Linear(width, 2 * width, impl)
        self.output = nn.Linear(width, width)
        self.norm = vk.FusedLayerNorm(width, stack.eps)
        self.inner, self.outer = nn.Linear(width, stack.mlp_width), nn.Linear(stack.mlp_width, width)
        self.activation = ACTIVATIONS[stack.activation]
        self.heads, self.impl = stack.heads, impl

    def forward(self, tokens: Tokens) -> Tensor:
        """`[B, D]`."""
        one_each = vk.SegmentLayout.joined((1, tokens.layout)).select((0,))
        query = self.query(self.probe).expand(one_each.num_samples, -1).unflatten(1, (self.heads, -1))
        key, value = self.key_value(tokens.hidden).unflatten(1, (2, self.heads, -1)).unbind(1)
        attended = vk.attention(query, key, value, layout=one_each, kv_layout=tokens.layout, impl=self.impl)
        found = self.output(attended.flatten(1))
        return found + self.outer(self.activation(self.inner(self.norm(found, impl=self.impl))))
