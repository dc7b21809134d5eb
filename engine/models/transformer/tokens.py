"""Packed streams, what cross-attention reads, and what the sub-layers of one pass share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import vlkernels as vk
from torch import Tensor

from engine.models.transformer.cache import Extension


class Tokens(NamedTuple):
    """A packed stream: `hidden` `[num_tokens, D]` and where each sample's segments lie in it.

    A tuple, because ZeRO-3 looks for the tensors of a module's output in tuples alone: there it hangs the hook that
    puts the module's parameters together again for its backward.
    """

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
    segments: tuple[int, ...] | None = None
    """Which segments of the stream the segments of `layout` are: what a mask table or networks per segment go by.
    A segment of which only some rows are selected may see no other causally."""

    @classmethod
    def of(cls, rows: Tensor, samples: Tensor, layout: vk.SegmentLayout, segment: int | None = None) -> SelectedRows:
        """Rows `[M]` of the stream, which belong to `samples` `[M]`, in ascending order; all are of `segment`."""
        bounds = torch.searchsorted(samples, torch.arange(layout.num_samples + 1, device=samples.device))
        most = min(layout.max_seqlen, len(samples))
        own = vk.SegmentLayout.from_cu_seqlens(bounds, max_seqlen=most, num_tokens=len(samples))
        return cls(rows, own.with_sample_ids(layout.sample_ids), None if segment is None else (segment,))

    @classmethod
    def whole(cls, layout: vk.SegmentLayout, segments: Sequence[int]) -> SelectedRows:
        """All rows of some segments."""
        rows = torch.arange(layout.num_tokens, device=layout.device)
        return cls(vk.take_segments(rows, layout, tuple(segments)), layout.select(segments), tuple(segments))

    def rows_of(self, mask: vk.SegmentMask | None) -> vk.SegmentMask | None:
        """The rows of the stream's mask table that the selected rows go by."""
        if mask is None:
            return None
        assert self.segments is not None, "selected rows belong to no segment of a mask table"
        return mask.of_queries(self.segments)


@dataclass(frozen=True)
class Context:
    """What every sub-layer of one pass shares."""

    layout: vk.SegmentLayout
    rng: vk.Rng | None = None
    mask: vk.SegmentMask | None = None
    bias: vk.RelativeBias | None = None
    selected: SelectedRows | None = None
    """In the last block of a pass: the only rows that need go on from its self-attention. Mask and bias are then theirs."""
    extension: Extension | None = None
    """Keys and values of earlier tokens, which the pass goes on from and adds its own to."""
    layer: int = 0
    """Which storage of the extension is this layer's."""
    stream_offset: int = 0
    """Added to the constants of dropout sites: what tells the applications of a shared block apart."""

    def on(self, layout: vk.SegmentLayout) -> Context:
        """The same pass on other rows, of which each is read by itself or reads another stream."""
        return Context(layout, self.rng, stream_offset=self.stream_offset)
