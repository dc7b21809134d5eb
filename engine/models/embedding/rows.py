"""Rows of a stream before they are made: sums of table rows, and how all of them are made in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.dropout import drop


@dataclass(frozen=True)
class Rows:
    """What the rows of one segment, of all samples, are the sum of.

    Embedders give them by methods that are no module's forward, called inside that of a `RowMaker`: under ZeRO-3 a table
    is there, in both directions, for the module in whose forward it is first looked at, if that gives a tensor.
    """

    tables: tuple[Tensor, ...]
    """Each [V, D]."""
    ids: Tensor
    """int32 [n, C]: the row that each table gives; -1: none."""
    dense: Tensor | None = None
    """[n, D]: rows computed from data, in the sum too."""
    norm: vk.FusedLayerNorm | None = None
    """Of the sum (None: the sum is the row)."""
    offset: Tensor | None = None
    """[D], added behind norm and dropout."""

    def of_one_type(self) -> Rows:
        """The same with tables of sines, which are no weights and stay float32, in the type of what they are added to."""
        learned = [one for one in self.tables if isinstance(one, nn.Parameter)]
        kinds = [one.dtype for one in (self.dense, *learned) if one is not None]
        if not kinds:
            return self
        return dataclasses.replace(self, tables=tuple(one.to(kinds[0]) for one in self.tables))

    def all_tables(self) -> Rows:
        """The same with the dense rows as a table, which other segments' rows need not have."""
        if self.dense is None:
            return self
        own = torch.arange(len(self.dense), dtype=torch.int32, device=self.ids.device)
        return Rows((*self.tables, self.dense), torch.cat((self.ids, own[:, None]), 1), None, self.norm, self.offset)


class RowMaker(nn.Module):
    """Makes rows: the sum, its norm and dropout, of several segments each with a norm of its own.

    Segments that all have a norm take one call of `vk.embed_layer_norm` straight into the stream.
    """

    def __init__(self, dropout: float, segments: int, streams: Iterator[int], impl: str):
        super().__init__()
        self.dropout = dropout
        self.streams = [next(streams) for _ in range(segments)]
        self.impl = impl

    def forward(self, embed: Callable[[], Sequence[Rows]], layout: vk.SegmentLayout, rng: vk.Rng | None) -> Tensor:
        """`[layout.num_tokens, D]`; `embed()` gives one part for every segment of the layout, in its order."""
        parts = [part.of_one_type() for part in embed()]
        if len(parts) == 1:
            return self._one(parts[0], layout, rng, self.streams[0])
        if all(part.norm is not None and part.offset is None for part in parts):
            return self._together(parts, layout, rng)
        segments = [(s,) for s in range(len(parts))]
        rows = [
            self._one(part, layout.select(segment), rng, stream)
            for part, segment, stream in zip(parts, segments, self.streams, strict=True)
        ]
        return vk.put_segments(rows, layout, segments, impl=self.impl)

    def _one(self, part: Rows, layout: vk.SegmentLayout, rng: vk.Rng | None, stream: int) -> Tensor:
        if part.norm is not None:
            dropout = {"dropout_p": self._dropout_p(), "layout": layout, "rng": rng, "stream": stream, "impl": self.impl}
            norm = part.norm
            rows = vk.embed_layer_norm(
                part.ids, part.tables, norm.weight, bias=norm.bias, dense=part.dense, eps=norm.eps, **dropout
            )
        else:
            rows = self._sum(part)
            if self._dropout_p() > 0:
                rows = drop(rows, self._dropout_p(), layout, rng, stream, self.impl)
        return rows if part.offset is None else rows + part.offset

    def _sum(self, part: Rows) -> Tensor:
        terms = [] if part.dense is None else [part.dense]
        terms += [vk.take_rows(t, ids, impl=self.impl) for t, ids in zip(part.tables, part.ids.unbind(1), strict=True)]
        return sum(terms[1:], terms[0])

    def _together(self, parts: Sequence[Rows], layout: vk.SegmentLayout, rng: vk.Rng | None) -> Tensor:
        parts = [part.all_tables() for part in parts]
        norms = [part.norm for part in parts]
        assert len({norm.eps for norm in norms}) == 1, "norms of one stream share their eps"
        return vk.embed_layer_norm(
            self._columns(parts, layout),
            [table for part in parts for table in part.tables],
            torch.stack([norm.weight for norm in norms]),
            bias=torch.stack([norm.bias for norm in norms]),
            norm_ids=layout.token_segment(),
            eps=norms[0].eps,
            dropout_p=self._dropout_p(),
            layout=layout,
            rng=rng,
            stream=self.streams[0],
            impl=self.impl,
        )

    def _columns(self, parts: Sequence[Rows], layout: vk.SegmentLayout) -> Tensor:
        """int32 `[num_tokens, C]`: the columns of all parts, -1 in those of other segments."""
        counts = [len(part.tables) for part in parts]
        before = [sum(counts[:s]) for s in range(len(parts))]
        wide = [
            F.pad(part.ids, (first, sum(counts) - first - count), value=-1)
            for part, first, count in zip(parts, before, counts, strict=True)
        ]
        return vk.put_segments(wide, layout, [(s,) for s in range(len(parts))], impl=self.impl)

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


def table(rows: int, width: int) -> nn.Parameter:
    """A learned table, drawn with the rest of the model's weights."""
    return nn.Parameter(torch.empty(rows, width))
