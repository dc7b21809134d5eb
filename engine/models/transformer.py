"""The packed transformer: pre- or post-LayerNorm, any mask table, optional cross-attention.

Tokens are one packed `[num_tokens, D]` tensor without padding. Every sub-layer leaves its output bias, the
dropout, the residual sum and the LayerNorm that follows to one fused call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine.sections import Stack

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class Tokens:
    """A packed stream: `hidden` `[num_tokens, D]` and where each sample's segments lie in it."""

    hidden: Tensor
    layout: vk.SegmentLayout

    def take(self, index: Tensor, impl: str = "auto") -> Tokens:
        """Samples `index` as a stream of their own; a sample may be drawn several times."""
        layout, positions = self.layout.take(index), self.layout.take_positions(index)
        if layout.device.type == "cpu" and not torch.compiler.is_compiling():
            # Lengths can be read here without waiting, so no rows are spent on the upper bound.
            layout = vk.SegmentLayout(layout.lengths, sample_ids=layout.sample_ids)
        return Tokens(vk.take_rows(self.hidden, positions[: layout.num_tokens], impl=impl), layout)


@dataclass(frozen=True)
class Source:
    """What cross-attention reads: keys and values of every cross layer `[Tk, 2, H, K]`, projected once.

    `index[b]` is the source sample that query sample `b` reads (default: sample `b`); many may read the same
    one.
    """

    keys_values: Sequence[Tensor]
    layout: vk.SegmentLayout
    index: Tensor | None = None
    mask: vk.SegmentMask | None = None


@dataclass(frozen=True)
class SelectedRows:
    """Some tokens of a stream, sample after sample: all that a pass is asked for."""

    index: Tensor
    """int64 [M]: rows of the stream."""
    layout: vk.SegmentLayout
    """Lengths [B, 1]: how many of each sample; of a stream [M, D] of their own."""

    @classmethod
    def of(cls, rows: Tensor, samples: Tensor, layout: vk.SegmentLayout) -> SelectedRows:
        """Rows `[M]` of the stream, which belong to `samples` `[M]`, in ascending order."""
        bounds = torch.searchsorted(samples, torch.arange(layout.num_samples + 1, device=samples.device))
        most = min(layout.max_seqlen, len(samples))
        own = vk.SegmentLayout.from_cu_seqlens(bounds, max_seqlen=most, num_tokens=len(samples))
        return cls(rows, own.with_sample_ids(layout.sample_ids))


@dataclass(frozen=True)
class Context:
    """What every sub-layer of one pass shares."""

    layout: vk.SegmentLayout
    rng: vk.Rng | None = None
    mask: vk.SegmentMask | None = None
    selected: SelectedRows | None = None
    """In the last block of a pass: the only rows that need go on from its self-attention."""


class Linear(nn.Linear):
    """`nn.Linear` by `vk.linear`."""

    def __init__(self, in_features: int, out_features: int, impl: str):
        super().__init__(in_features, out_features)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        return vk.linear(x, self.weight, self.bias, impl=self.impl)


class DeferredBiasLinear(Linear):
    """A linear map whose bias is left to the fused add-and-norm behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return vk.linear(x, self.weight, impl=self.impl)


class QueryKeyValue(Linear):
    """The three projections of self-attention in one map: `[T, 3 D]`, or, where only some rows ask, their
    queries `[M, D]` beside the keys and values `[T, 2 D]` of all."""

    def forward(self, x: Tensor, selected: SelectedRows | None = None) -> Tensor | tuple[Tensor, ...]:
        if selected is None:
            return super().forward(x)
        parts = x.shape[1], 2 * x.shape[1]
        (query, key_value), biases = self.weight.split(parts), self.bias.split(parts)
        rows = vk.take_rows(x, selected.index, impl=self.impl)
        return tuple(
            vk.linear(read, weight, bias, impl=self.impl)
            for read, weight, bias in zip((rows, x), (query, key_value), biases, strict=True)
        )


class Sublayer(nn.Module):
    """A residual branch: its norm, its output map (bias deferred) and the constants of its dropout sites."""

    def __init__(self, stack: Stack, inner_width: int, streams: Iterator[int], impl: str):
        super().__init__()
        self.norm = vk.FusedLayerNorm(stack.width, stack.eps)
        self.output = DeferredBiasLinear(inner_width, stack.width, impl)
        self.output_stream = next(streams)
        self.dropout = stack.dropout
        self.impl = impl


class SelfAttention(Sublayer):
    """Multi-head attention of the stream to itself under the pass's mask table."""

    def __init__(self, stack: Stack, streams: Iterator[int], impl: str):
        super().__init__(stack, stack.width, streams, impl)
        self.query_key_value = QueryKeyValue(stack.width, 3 * stack.width, impl)
        self.heads = stack.heads
        self.attention_dropout = stack.attention_dropout
        self.attention_stream = next(streams)

    def forward(self, x: Tensor, context: Context, _: None = None) -> Tensor:
        attend = self._attend if context.selected is None else self._attend_from_selected
        options = {
            "dropout_p": self.attention_dropout if self.training else 0.0,
            "rng": context.rng,
            "stream": self.attention_stream,
            "impl": self.impl,
        }
        return self.output(attend(x, context, options).flatten(1))

    def _attend(self, x: Tensor, context: Context, options: dict[str, Any]) -> Tensor:
        qkv = self.query_key_value(x).unflatten(1, (3, self.heads, -1))
        return vk.attention_qkvpacked(qkv, layout=context.layout, mask=context.mask, **options)

    def _attend_from_selected(self, x: Tensor, context: Context, options: dict[str, Any]) -> Tensor:
        assert context.mask is None, "selected rows belong to no segment of a mask table"
        query, key_value = self.query_key_value(x, context.selected)
        query, key_value = query.unflatten(1, (self.heads, -1)), key_value.unflatten(1, (2, self.heads, -1))
        streams = {"layout": context.selected.layout, "kv_layout": context.layout}
        return vk.attention(query, key_value[:, 0], key_value[:, 1], **streams, **options)


class CrossAttention(Sublayer):
    """Multi-head attention of the stream to a source whose keys and values are projected beforehand."""

    def __init__(self, stack: Stack, source_width: int, streams: Iterator[int], impl: str):
        super().__init__(stack, stack.width, streams, impl)
        self.query = Linear(stack.width, stack.width, impl)
        self.key_value = Linear(source_width, 2 * stack.width, impl)
        self.heads = stack.heads
        self.attention_dropout = stack.attention_dropout
        self.attention_stream = next(streams)

    def project(self, source: Tensor) -> Tensor:
        """Keys and values `[Tk, 2, H, K]` of source rows `[Tk, D]`."""
        return self.key_value(source).view(source.shape[0], 2, self.heads, -1)

    def forward(self, x: Tensor, context: Context, source: tuple[Source, Tensor]) -> Tensor:
        read, keys_values = source
        attended = vk.attention(
            self.query(x).view(x.shape[0], self.heads, -1),
            keys_values[:, 0],
            keys_values[:, 1],
            layout=context.layout,
            mask=read.mask,
            kv_layout=read.layout,
            kv_index=read.index,
            dropout_p=self.attention_dropout if self.training else 0.0,
            rng=context.rng,
            stream=self.attention_stream,
            impl=self.impl,
        )
        return self.output(attended.flatten(1))


class FeedForward(Sublayer):
    """Two linear maps around a non-linearity."""

    def __init__(self, stack: Stack, streams: Iterator[int], impl: str):
        super().__init__(stack, stack.mlp_width, streams, impl)
        self.inner = Linear(stack.width, stack.mlp_width, impl)
        self.activation = ACTIVATIONS[stack.activation]

    def forward(self, x: Tensor, context: Context, _: None = None) -> Tensor:
        return self.output(self.activation(self.inner(x)))


class Block(nn.Module):
    """Self-attention, cross-attention where it has one and the pass has a source, feed-forward."""

    def __init__(self, stack: Stack, source_width: int | None, streams: Iterator[int], impl: str):
        super().__init__()
        self.self_attention = SelfAttention(stack, streams, impl)
        self.cross_attention = (
            CrossAttention(stack, source_width, streams, impl) if source_width is not None else None
        )
        self.feed_forward = FeedForward(stack, streams, impl)
        self.pre_norm = stack.norm == "pre"

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        exit_norm: nn.LayerNorm | None,
        context: Context,
        source: tuple[Source, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) behind the block. In a pre-norm stack x is normalised already: by this block's first
        norm on entry and by `exit_norm`, the next block's first or the stack's final norm, on exit."""
        cross = self.cross_attention if source is not None else None
        sublayers = [layer for layer in (self.self_attention, cross, self.feed_forward) if layer is not None]
        norms = [layer.norm for layer in sublayers]
        if self.pre_norm:
            norms = [*norms[1:], exit_norm]
        for layer, norm in zip(sublayers, norms, strict=True):
            update = layer(x, context, source if layer is cross else None)
            if layer is self.self_attention and context.selected is not None:
                residual = vk.take_rows(residual, context.selected.index, impl=layer.impl)
                context = Context(context.selected.layout, context.rng)
            x, residual = self._add_and_norm(norm, update, residual, layer, context)
        return x, residual

    def _add_and_norm(
        self, norm: nn.LayerNorm, update: Tensor, residual: Tensor, layer: Sublayer, context: Context
    ) -> tuple[Tensor, Tensor]:
        """(normalised, next residual): the next residual is the sum itself (pre-norm) or the normalised
        value."""
        result = norm(
            update,
            residual=residual,
            linear_bias=layer.output.bias,
            dropout_p=layer.dropout if layer.training else 0.0,
            layout=context.layout,
            rng=context.rng,
            stream=layer.output_stream,
            return_sum=self.pre_norm,
            impl=layer.impl,
        )
        return result if self.pre_norm else (result, result)


class PackedTransformer(nn.Module):
    """A stack of blocks over packed tokens; every `cross_every`-th block, from the first, can read a source.

    Args:
        stack: sizes and options of the blocks.
        streams: yields the constants that keep the dropout sites of a model apart.
        source_width: width of the rows that cross-attention reads; `None` builds no cross-attention.
    """

    def __init__(
        self,
        stack: Stack,
        streams: Iterator[int],
        *,
        source_width: int | None = None,
        cross_every: int = 1,
        impl: str = "auto",
    ):
        super().__init__()
        widths = [source_width if layer % cross_every == 0 else None for layer in range(stack.layers)]
        self.blocks = nn.ModuleList(Block(stack, width, streams, impl) for width in widths)
        self.final_norm = vk.FusedLayerNorm(stack.width, stack.eps) if stack.norm == "pre" else None
        self.activation_checkpointing = False
        self.impl = impl

    def project_source(self, source: Tensor) -> list[Tensor]:
        """Keys and values of every cross layer: done once per source, whoever reads them."""
        return [b.cross_attention.project(source) for b in self.blocks if b.cross_attention is not None]

    def forward(
        self,
        tokens: Tokens,
        *,
        rng: vk.Rng | None = None,
        mask: vk.SegmentMask | None = None,
        source: Source | None = None,
        selected: SelectedRows | None = None,
    ) -> Tokens:
        """States of all tokens, or of the `selected` ones, which are the same without dropout: the last block
        then computes nothing but their keys and values for the others."""
        context = Context(tokens.layout, rng, mask)
        x, residual = tokens.hidden, tokens.hidden
        if self.final_norm is not None:
            x = self.blocks[0].self_attention.norm(x, impl=self.impl)
        unread = iter(source.keys_values) if source is not None else None
        for block, exit_norm in zip(self.blocks, self._exit_norms(), strict=True):
            if block is self.blocks[-1]:
                context = replace(context, selected=selected)
            read = (
                (source, next(unread)) if unread is not None and block.cross_attention is not None else None
            )
            x, residual = self._run(block, x, residual, exit_norm, context, read)
        return Tokens(x, tokens.layout if selected is None else selected.layout)

    def _exit_norms(self) -> list[nn.LayerNorm | None]:
        return [*(block.self_attention.norm for block in self.blocks[1:]), self.final_norm]

    def _run(self, block: Block, *arguments: object) -> tuple[Tensor, Tensor]:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Dropout is counter-based, so the recomputed forward draws the same masks without saving a state.
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)
