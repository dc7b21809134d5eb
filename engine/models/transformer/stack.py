"""The stack: blocks over packed tokens, their relative bias, and the pass through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.models.transformer.attention import Sublayer
from engine.models.transformer.block import Block, GroupedBlock, PlainBlock
from engine.models.transformer.cache import Extension, KeyValueCache
from engine.models.transformer.maps import Norm, norm_of
from engine.models.transformer.relative_bias import Distances
from engine.models.transformer.tokens import Context, SelectedRows, Source, Tokens
from engine.sections import Stack


class Blocks(nn.Module):
    """What runs blocks, and can recompute each in the backward instead of keeping its activations."""

    activation_checkpointing = False

    def _run(self, block: Block, *arguments: object) -> Any:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Dropout is counter-based, so the recomputed forward draws the same masks without saving a state.
            return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        return block(*arguments)


class PackedTransformer(Blocks):
    """A stack of blocks over packed tokens, some of which can read a source.

    Args:
        stack: sizes and options of the blocks.
        streams: yields the constants that keep the dropout sites of a model apart.
        source_width: width of the rows that cross-attention reads; `None` builds no cross-attention.
        cross_every, cross_from: every how many blocks cross-attention stands, from which block on.
        groups: groups of segments with feed-forward networks of their own; rows of the first group alone read
            the source. By default one network serves all rows, which all read.
        within: what the positions of a relative bias are counted in.
    """

    def __init__(
        self,
        stack: Stack,
        streams: Iterator[int],
        *,
        source_width: int | None = None,
        cross_every: int = 1,
        cross_from: int = 0,
        groups: Sequence[Sequence[int]] = (),
        within: Literal["segment", "sample"] = "segment",
        impl: str = "auto",
    ):
        super().__init__()
        assert not groups or stack.norm == "post", "one fused norm serves all rows behind self-attention"

        def build(layer: int) -> Block:
            crosses = layer >= cross_from and (layer - cross_from) % cross_every == 0
            width = source_width if crosses else None
            return GroupedBlock(stack, width, streams, impl, groups) if groups else PlainBlock(stack, width, streams, impl)

        self.blocks = nn.ModuleList(build(layer) for layer in range(1 if stack.shared else stack.layers))
        self.shared, self.layers = stack.shared, stack.layers
        if stack.shared:  # further applications of the block draw by constants of their own, behind those of the first
            self.sites = sum(part.sites for part in self.blocks.modules() if isinstance(part, Sublayer))
            for _ in range((stack.layers - 1) * self.sites):
                next(streams)
        self.pre_norm = stack.norm == "pre"
        self.final_norm = norm_of(stack) if self.pre_norm and stack.final_norm else None
        self.distances = Distances(stack) if stack.relative_position is not None else None
        self.within = within
        self.impl = impl

    def new_cache(self, *, slots: int, capacity: int, segments: int, like: Tensor) -> KeyValueCache:
        """For decoding with this stack; see `KeyValueCache`."""
        attention = self.blocks[0].self_attention
        shape = self.layers, attention.heads, attention.output.in_features // attention.heads
        return KeyValueCache(shape, slots=slots, capacity=capacity, segments=segments, like=like)

    def project_source(self, source: Tensor) -> list[Tensor]:
        """Keys and values of every cross layer: done once per source, whoever reads them."""
        return [block.cross_attention.project(source) for block in self._cross_blocks()]

    def forward(
        self,
        tokens: Tokens,
        *,
        rng: vk.Rng | None = None,
        mask: vk.SegmentMask | None = None,
        boxes: Tensor | None = None,
        source: Source | None = None,
        selected: SelectedRows | None = None,
        extension: Extension | None = None,
        layers: slice = slice(None),
    ) -> Tokens:
        """States of all tokens, or of the `selected` ones, which are the same without dropout: the last block
        then computes nothing but their keys and values for the others. Without blocks the tokens are their states.

        `boxes` `[num_tokens, 4]` (x0, y0, x1, y1) are what a bias by boxes reads. With an `extension` of a cache the
        tokens go on from those before them. Of a post-norm stack some `layers` run alone.
        """
        assert layers == slice(None) or not self.pre_norm, "between two layers a pre-norm stream is two tensors"
        x, residual = tokens.hidden, tokens.hidden
        entry_norm, *exit_norms = self._norms()
        if self.pre_norm and entry_norm is not None:
            x = entry_norm(x, impl=self.impl)
        reads = {} if source is None else dict(zip(self._cross_blocks(), source.keys_values, strict=True))
        contexts = self._contexts(Context(tokens.layout, rng, mask, extension=extension), boxes, selected)
        columns = (self._applied(), exit_norms, contexts)
        for block, exit_norm, context in zip(*(column[layers] for column in columns), strict=True):
            read = (source, reads[block]) if block in reads else None
            x, residual = self._run(block, x, residual, exit_norm, context, read)
        return Tokens(x, tokens.layout if selected is None else selected.layout)

    def _applied(self) -> list[Block]:
        """The block of every layer."""
        return [self.blocks[0]] * self.layers if self.shared else list(self.blocks)

    def _norms(self) -> list[Norm | None]:
        """Before the first block, between blocks and behind the last."""
        return [*(block.self_attention.norm for block in self._applied()), self.final_norm]

    def _cross_blocks(self) -> list[Block]:
        return [block for block in self.blocks if block.cross_attention is not None]

    def _contexts(self, context: Context, boxes: Tensor | None, selected: SelectedRows | None) -> list[Context]:
        """What the sub-layers of every layer share."""
        contexts = [context] * self.layers
        if self.shared or context.extension is not None:
            contexts = [
                replace(context, layer=layer, stream_offset=layer * self.sites if self.shared else 0)
                for layer in range(self.layers)
            ]
        if selected is not None:
            contexts[-1] = replace(contexts[-1], selected=selected, mask=selected.rows_of(context.mask))
        return contexts if self.distances is None else self._biased(contexts, boxes)

    def _biased(self, contexts: list[Context], boxes: Tensor | None) -> list[Context]:
        """The same with the relative bias, of which only selected rows need another."""
        first, last, distances = contexts[0], contexts[-1], self.distances
        tables, extension = distances(), first.extension
        if extension is None:
            position = first.layout.token_position(self.within)
        else:
            position = extension.in_segment if self.within == "segment" else extension.in_sample
        queries, keys = distances.coordinates(position, boxes), None
        if extension is not None:
            keys = distances.coordinates(extension.layout.token_position(self.within), None)
        bias = distances.bias(tables, queries, keys)
        contexts = [replace(context, bias=bias) for context in contexts]
        if last.selected is not None:
            asking = vk.take_rows(queries, last.selected.index, impl=self.impl)
            own = distances.bias(tables, asking, queries if keys is None else keys)
            contexts[-1] = replace(last, bias=own)
        return contexts
