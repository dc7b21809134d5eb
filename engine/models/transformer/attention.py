"""Residual branches that attend: to the stream itself, and to a source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import vlkernels as vk
from torch import Tensor, nn

from engine.models.transformer.maps import DeferredBiasLinear, Linear, QueryKeyValue, norm_of
from engine.models.transformer.tokens import Context, Source
from engine.sections import Stack


class Sublayer(nn.Module):
    """A residual branch: its norm, its output map (bias deferred) and the constants of its dropout sites."""

    sites = 1
    """How many constants of dropout sites it takes."""

    def __init__(self, stack: Stack, inner_width: int, streams: Iterator[int], impl: str):
        super().__init__()
        self.norm = norm_of(stack)
        self.output = DeferredBiasLinear(inner_width, stack.width, impl, bias=stack.biases != "none")
        self.output_stream = next(streams)
        self.dropout = stack.dropout
        self.impl = impl


class Attention(Sublayer):
    """What both kinds of attention have."""

    sites = 2

    def __init__(
        self, stack: Stack, streams: Iterator[int], impl: str, *, inner_width: int | None = None, heads: int | None = None
    ):
        super().__init__(stack, inner_width or stack.width, streams, impl)
        self.heads = heads or stack.heads
        self.softmax_scale = stack.softmax_scale
        self.attention_dropout = stack.attention_dropout
        self.attention_stream = next(streams)

    def options(self, context: Context) -> dict[str, Any]:
        """Keyword arguments of every attention call."""
        return {
            "softmax_scale": self.softmax_scale,
            "dropout_p": self.attention_dropout if self.training else 0.0,
            "rng": context.rng,
            "stream": self.attention_stream + context.stream_offset,
            "impl": self.impl,
        }


class SelfAttention(Attention):
    """Multi-head attention of the stream to itself under the pass's mask table and relative bias."""

    def __init__(self, stack: Stack, streams: Iterator[int], impl: str):
        super().__init__(stack, streams, impl)
        self.query_key_value = QueryKeyValue(stack, impl)

    def forward(self, x: Tensor, context: Context, _: None = None) -> Tensor:
        alone = context.selected is None and context.extension is None
        attend = self._attend if alone else self._attend_elsewhere
        options = {"mask": context.mask, "bias": context.bias, **self.options(context)}
        return self.output(attend(x, context, options).flatten(1))

    def _attend(self, x: Tensor, context: Context, options: dict[str, Any]) -> Tensor:
        qkv = self.query_key_value(x).unflatten(1, (3, self.heads, -1))
        return vk.attention_qkvpacked(qkv, layout=context.layout, **options)

    def _attend_elsewhere(self, x: Tensor, context: Context, options: dict[str, Any]) -> Tensor:
        """Where the keys are not the rows that ask: of selected rows, or beside those of earlier tokens."""
        projected = self.query_key_value(x, context.selected)
        parts = x.shape[1], 2 * x.shape[1]
        query, key_value = projected.split(parts, dim=1) if context.selected is None else projected
        query, key_value = query.unflatten(1, (self.heads, -1)), key_value.unflatten(1, (2, self.heads, -1))
        asking = context.layout if context.selected is None else context.selected.layout
        keys, slots = context.layout, None
        if (extension := context.extension) is not None:
            key_value, keys, slots = extension.write(context.layer, key_value), extension.layout, extension.slots
        streams = {"layout": asking, "kv_layout": keys, "kv_index": slots}
        return vk.attention(query, key_value[:, 0], key_value[:, 1], **streams, **options)


class CrossAttention(Attention):
    """Multi-head attention of the stream to a source whose keys and values are projected beforehand.

    Args:
        inner_width, heads: of queries, keys and values; by default the stream's.
    """

    def __init__(
        self,
        stack: Stack,
        source_width: int,
        streams: Iterator[int],
        impl: str,
        *,
        inner_width: int | None = None,
        heads: int | None = None,
    ):
        super().__init__(stack, streams, impl, inner_width=inner_width, heads=heads)
        biased, inner = stack.biases != "none", self.output.in_features
        self.query = Linear(stack.width, inner, impl, biased)
        self.key_value = Linear(source_width, 2 * inner, impl, biased)

    def project(self, source: Tensor) -> Tensor:
        """Keys and values `[Tk, 2, H, K]` of source rows `[Tk, D]`."""
        return self.key_value(source).unflatten(1, (2, self.heads, -1))

    def forward(self, x: Tensor, context: Context, source: tuple[Source, Tensor]) -> Tensor:
        read, keys_values = source
        attended = vk.attention(
            self.query(x).unflatten(1, (self.heads, -1)),
            keys_values[:, 0],
            keys_values[:, 1],
            layout=context.layout,
            mask=read.mask,
            kv_layout=read.layout,
            kv_index=read.index,
            **self.options(context),
        )
        return self.output(attended.flatten(1))
