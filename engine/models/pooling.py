"""Pooling: one row for every sample of a stream."""

from __future__ import annotations

from typing import Literal

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.embedding.rows import table
from engine.models.transformer import ACTIVATIONS, Tokens
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
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm = vk.FusedLayerNorm(width, stack.eps)
        self.inner, self.outer = nn.Linear(width, stack.mlp_width), nn.Linear(stack.mlp_width, width)
        self.activation = ACTIVATIONS[stack.activation]
        self.heads, self.impl = stack.heads, impl

    def forward(self, tokens: Tokens) -> Tensor:
        """`[B, D]`."""
        one_each = vk.SegmentLayout.joined((1, tokens.layout)).select((0,))
        maps = self.query_key_value
        parts = [part.split((len(maps.weight) // 3, 2 * len(maps.weight) // 3)) for part in (maps.weight, maps.bias)]
        (query_map, key_value_map), (query_bias, key_value_bias) = parts
        query = F.linear(self.probe, query_map, query_bias).expand(one_each.num_samples, -1)
        key_value = vk.linear(tokens.hidden, key_value_map, key_value_bias, impl=self.impl)
        query, key_value = query.unflatten(1, (self.heads, -1)), key_value.unflatten(1, (2, self.heads, -1))
        streams = {"layout": one_each, "kv_layout": tokens.layout}
        attended = vk.attention(query, key_value[:, 0], key_value[:, 1], **streams, impl=self.impl)
        found = self.output(attended.flatten(1))
        return found + self.outer(self.activation(self.inner(self.norm(found, impl=self.impl))))
