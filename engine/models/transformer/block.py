"""Blocks: sub-layers one behind the other, each with the fused sum and norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import vlkernels as vk
from torch import Tensor, nn

from engine.models.transformer.attention import CrossAttention, SelfAttention, Sublayer
from engine.models.transformer.feed_forward import FeedForward
from engine.models.transformer.maps import Norm
from engine.models.transformer.tokens import Context, Source
from engine.sections import Stack

Read = tuple[Source, Tensor]
"""A source, and its keys and values for one layer."""


class Block(nn.Module):
    """What every block has: self-attention, cross-attention where it is given the width of a source."""

    def __init__(self, stack: Stack, source_width: int | None, streams: Iterator[int], impl: str):
        super().__init__()
        self.self_attention = SelfAttention(stack, streams, impl)
        self.cross_attention = (
            CrossAttention(stack, source_width, streams, impl) if source_width is not None else None
        )
        self.pre_norm = stack.norm == "pre"

    def _add_and_norm(
        self, norm: Norm | None, update: Tensor, residual: Tensor, layer: Sublayer, context: Context
    ) -> tuple[Tensor, Tensor]:
        """(normalised, next residual): the next residual is the sum itself (pre-norm) or the normalised
        value."""
        fused = {
            "residual": residual,
            "linear_bias": layer.output.bias,
            "dropout_p": layer.dropout if layer.training else 0.0,
            "layout": context.layout,
            "rng": context.rng,
            "stream": layer.output_stream + context.stream_offset,
            "return_sum": self.pre_norm,
            "impl": layer.impl,
        }
        if norm is None:  # the end of a stack without a final norm: of the fused call the sum alone is read
            _, total = vk.layer_norm(update, None, None, **fused)
            return total, total
        result = norm(update, **fused)
        return result if self.pre_norm else (result, result)


class PlainBlock(Block):
    """Self-attention, cross-attention where it has one and the pass has a source, feed-forward."""

    def __init__(self, stack: Stack, source_width: int | None, streams: Iterator[int], impl: str):
        super().__init__(stack, source_width, streams, impl)
        self.feed_forward = FeedForward(stack, streams, impl)

    def forward(
        self, x: Tensor, residual: Tensor, exit_norm: Norm | None, context: Context, source: Read | None
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) behind the block. In a pre-norm stack x is normalised already: by this block's first
        norm on entry and by `exit_norm`, the next block's first or the stack's final norm, on exit."""
        cross = self.cross_attention if source is not None else None
        sublayers = [layer for layer in (self.self_attention, cross, self.feed_forward) if layer is not None]
        norms: list[Norm | None] = [layer.norm for layer in sublayers]
        if self.pre_norm:
            norms = [*norms[1:], exit_norm]
        for layer, norm in zip(sublayers, norms, strict=True):
            update = layer(x, context, source if layer is cross else None)
            if layer is self.self_attention and context.selected is not None:
                residual = vk.take_rows(residual, context.selected.index, impl=layer.impl)
                context = context.on(context.selected.layout)
            x, residual = self._add_and_norm(norm, update, residual, layer, context)
        return x, residual


class ReadingBlock(Block):
    """A post-norm block without self-attention: cross-attention of an inner width of its own, feed-forward."""

    def __init__(
        self, stack: Stack, source_width: int, streams: Iterator[int], impl: str, *, inner_width: int, heads: int
    ):
        nn.Module.__init__(self)
        assert stack.norm == "post", "the streams that read each other are normalised"
        sizes = {"inner_width": inner_width, "heads": heads}
        self.cross_attention = CrossAttention(stack, source_width, streams, impl, **sizes)
        self.feed_forward = FeedForward(stack, streams, impl)
        self.pre_norm = False

    def forward(self, x: Tensor, context: Context, source: Read) -> Tensor:
        for layer in (self.cross_attention, self.feed_forward):
            x, _ = self._add_and_norm(layer.norm, layer(x, context, source), x, layer, context)
        return x


class GroupedBlock(Block):
    """A post-norm block with a feed-forward network for each group of segments. Rows of the first group alone read the
    source: the others skip cross-attention whole, with its bias and norm.

    Args:
        groups: the segments of each group; together all segments of the stream.
    """

    def __init__(
        self,
        stack: Stack,
        source_width: int | None,
        streams: Iterator[int],
        impl: str,
        groups: Sequence[Sequence[int]],
    ):
        super().__init__(stack, source_width, streams, impl)
        self.groups = tuple(map(tuple, groups))
        self.feed_forwards = nn.ModuleList(FeedForward(stack, streams, impl) for _ in self.groups)

    def forward(
        self, x: Tensor, residual: Tensor, exit_norm: Norm | None, context: Context, source: Read | None
    ) -> tuple[Tensor, Tensor]:
        """As `PlainBlock.forward`; of selected rows their `segments` say which groups they belong to."""
        layer, present = self.self_attention, range(context.layout.num_segments)
        update = layer(x, context)
        if (chosen := context.selected) is not None:
            assert chosen.segments is not None, "rows go to the network of their segment"
            residual, present = vk.take_rows(residual, chosen.index, impl=layer.impl), chosen.segments
            context = context.on(chosen.layout)
        x, _ = self._add_and_norm(layer.norm, update, residual, layer, context)
        columns = [tuple(present.index(s) for s in group if s in present) for group in self.groups]
        streams = [own for own in columns if own]
        rows = iter(vk.take_segments(x, context.layout, streams, impl=layer.impl))
        read = [
            self._read(next(rows), context.on(context.layout.select(own)), source if number == 0 else None, feed_forward)
            for number, (own, feed_forward) in enumerate(zip(columns, self.feed_forwards, strict=True))
            if own
        ]
        x = vk.put_segments(read, context.layout, streams, impl=layer.impl)
        return x, x

    def _read(self, x: Tensor, context: Context, source: Read | None, feed_forward: FeedForward) -> Tensor:
        """A group's rows behind cross-attention, where they read a source, and their feed-forward network."""
        if source is not None and self.cross_attention is not None:
            cross = self.cross_attention
            x, _ = self._add_and_norm(cross.norm, cross(x, context, source), x, cross, context)
        return self._add_and_norm(feed_forward.norm, feed_forward(x, context), x, feed_forward, context)[0]
