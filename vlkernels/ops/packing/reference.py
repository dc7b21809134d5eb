"""Packing by definition: list, for every row of the result, the row it comes from, and index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout

Segments = Sequence[int] | Sequence[Sequence[int]]


def pack(tensors: Sequence[Tensor], layout: SegmentLayout) -> Tensor:
    sample, segment, position = layout.token_sample(), layout.token_segment(), layout.token_position()
    source = torch.full_like(sample, -1)
    first = 0
    for s, tensor in enumerate(tensors):
        source = torch.where(segment == s, first + sample * tensor.shape[1] + position, source)
        first += tensor.shape[0] * tensor.shape[1]
    return _rows_at(torch.cat([tensor.flatten(0, 1) for tensor in tensors]), source)


def unpack(x: Tensor, layout: SegmentLayout, max_lengths: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    widths = layout.max_segment_lengths if max_lengths is None else max_lengths
    return tuple(_rows_at(x, _padded_rows(layout, s, width)) for s, width in enumerate(widths))


def take_segments(x: Tensor, layout: SegmentLayout, segments: Segments) -> Tensor | tuple[Tensor, ...]:
    streams, is_one = streams_of(segments)
    taken = tuple(_rows_at(x, _source_rows(layout, stream)) for stream in streams)
    return taken[0] if is_one else taken


def put_segments(rows: Tensor | Sequence[Tensor], layout: SegmentLayout, segments: Segments) -> Tensor:
    streams, is_one = streams_of(segments)
    parts = [rows] if is_one else list(rows)
    sample, segment, position = layout.token_sample(), layout.token_segment(), layout.token_position()
    source = torch.full_like(sample, -1)
    first = 0
    for part, stream in zip(parts, streams, strict=True):
        starts = layout.select(stream).starts
        for column, s in enumerate(stream):
            source = torch.where(segment == s, first + _rows_at(starts[:, column], sample) + position, source)
        first += part.shape[0]
    return _rows_at(torch.cat(parts), source)


def take_rows(x: Tensor, positions: Tensor, capacity: int | None = None) -> Tensor:
    padding = 0 if capacity is None else capacity - positions.shape[0]
    source = torch.nn.functional.pad(positions, (0, padding), value=-1)
    # Through float32, so that the gradients of a row taken several times are added in float32.
    return _rows_at(_wide(x), source).to(x.dtype)


def segment_mean(x: Tensor, layout: SegmentLayout, segment: int) -> Tensor:
    rows = _rows_at(_wide(x), _padded_rows(layout, segment, layout.max_segment_lengths[segment]))
    count = layout.lengths[:, segment].clamp(min=1).view(-1, *[1] * (x.dim() - 1))
    return (rows.sum(1) / count).to(x.dtype)


def streams_of(segments: Segments) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """The segments of every stream, and whether the caller named one stream by plain integers."""
    is_one = not any(isinstance(s, (tuple, list)) for s in segments)
    return ((tuple(segments),) if is_one else tuple(tuple(stream) for stream in segments)), is_one


def _rows_at(x: Tensor, source: Tensor) -> Tensor:
    """Rows of ``x``; a source of -1 reads the zero row appended to it."""
    return torch.cat((x, x.new_zeros(1, *x.shape[1:])))[source.long()]


def _padded_rows(layout: SegmentLayout, segment: int, width: int) -> Tensor:
    """``[B, width]``: the rows of one segment of every sample, -1 past its end."""
    offset = torch.arange(width, dtype=torch.int32, device=layout.device)
    starts, lengths = layout.starts[:, segment, None], layout.lengths[:, segment, None]
    return torch.where(offset < lengths, starts + offset, -1)


def _source_rows(layout: SegmentLayout, stream: Sequence[int]) -> Tensor:
    """For every row of ``layout.select(stream)`` the row of ``layout`` it comes from, -1 past the last."""
    selected = layout.select(stream)
    sample, column, position = selected.token_sample(), selected.token_segment(), selected.token_position()
    source = torch.full_like(sample, -1)
    for j, s in enumerate(stream):
        source = torch.where(column == j, _rows_at(layout.starts[:, s], sample) + position, source)
    return source


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
