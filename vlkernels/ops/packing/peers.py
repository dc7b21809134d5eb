"""Other people's ways to move rows.

Those that take a layout find their rows in every call; the others have their masks and indices ready, by a ``with_...``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.spec import Arguments

Padded = tuple[Tensor, ...]


def valid_rows(layout: SegmentLayout, widths: Sequence[int]) -> Tensor:
    """bool ``[B, sum of widths]``: the mask other code carries beside padded tensors."""
    lengths = layout.lengths.unsqueeze(2).unbind(1)
    return torch.cat([torch.arange(w, device=n.device) < n for w, n in zip(widths, lengths)], dim=1)


def pack_by_mask(tensors: Sequence[Tensor], layout: SegmentLayout) -> Tensor:
    return torch.cat(list(tensors), dim=1)[valid_rows(layout, [t.shape[1] for t in tensors])]


def pack_by_index(tensors: Sequence[Tensor], layout: SegmentLayout) -> Tensor:
    joined, rows = _joined(tensors, layout)
    return joined.index_select(0, rows)


def pack_by_gather(tensors: Sequence[Tensor], layout: SegmentLayout) -> Tensor:
    """As UNITER and flash-attn's ``bert_padding`` do: an index expanded over the width."""
    joined, rows = _joined(tensors, layout)
    return joined.gather(0, rows[:, None].expand(-1, joined.shape[1]))


def _joined(tensors: Sequence[Tensor], layout: SegmentLayout) -> tuple[Tensor, Tensor]:
    valid = valid_rows(layout, [t.shape[1] for t in tensors])
    return torch.cat(list(tensors), dim=1).flatten(0, 1), valid.flatten().nonzero().flatten()


def unpack_by_mask(x: Tensor, layout: SegmentLayout) -> tuple[Tensor, ...]:
    widths = layout.max_segment_lengths
    padded = x.new_zeros(layout.num_samples, sum(widths), *x.shape[1:])
    return padded.masked_scatter(valid_rows(layout, widths)[..., None], x).split(list(widths), dim=1)


def take_by_mask(x: Tensor, layout: SegmentLayout, segments: Any) -> tuple[Tensor, ...]:
    segment = layout.token_segment()
    return tuple(x[segment == stream[0]] for stream in segments)


def put_by_mask(rows: Sequence[Tensor], layout: SegmentLayout, segments: Any) -> Tensor:
    segment = layout.token_segment()
    out = rows[0].new_zeros(layout.num_tokens, *rows[0].shape[1:])
    for part, stream in zip(rows, segments):
        out = out.index_put((segment == stream[0],), part)
    return out


def mean_by_index_add(x: Tensor, layout: SegmentLayout, segment: int) -> Tensor:
    chosen = layout.token_segment() == segment
    total = x.new_zeros(layout.num_samples, *x.shape[1:])
    return total.index_add(0, layout.token_sample()[chosen], x[chosen]) / layout.lengths[:, segment, None]


def cat_and_select(tensors: Sequence[Tensor], rows: Tensor) -> Tensor:
    return torch.cat(list(tensors), dim=1).flatten(0, 1).index_select(0, rows)


def uniter(tensors: Sequence[Tensor], gather_index: Tensor, rows: Tensor) -> Tensor:
    """UNITER's embedder gathers each sample to the front of a padded batch; then the padding is left out."""
    joined = torch.cat(list(tensors), dim=1)
    compact = joined.gather(1, gather_index.unsqueeze(-1).expand(-1, -1, joined.shape[2]))
    return compact.flatten(0, 1).index_select(0, rows)


def bert_padding_pack() -> Callable[..., Tensor]:
    """flash-attn's unpad_input, which finds the rows of its mask in every call and waits for their number."""
    unpad = importlib.import_module("flash_attn.bert_padding").unpad_input
    return lambda tensors, valid: unpad(torch.cat(list(tensors), dim=1), valid)[0]


def zeros_and_copy(x: Tensor, rows: Tensor, widths: Sequence[int], samples: int) -> Padded:
    padded = x.new_zeros(samples * sum(widths), x.shape[1]).index_copy(0, rows, x)
    return padded.unflatten(0, (samples, -1)).split(list(widths), dim=1)


def bert_padding_unpack() -> Callable[..., Padded]:
    """flash-attn's pad_input."""
    pad = importlib.import_module("flash_attn.bert_padding").pad_input
    return lambda x, rows, widths, samples: pad(x, rows, samples, sum(widths)).split(list(widths), dim=1)


def select_rows(x: Tensor, positions: Tensor) -> Tensor:
    return x.index_select(0, positions)


def bert_padding_rows() -> Callable[..., Tensor]:
    """flash-attn's index_first_axis; its backward writes, so no row may be taken twice."""
    take = importlib.import_module("flash_attn.bert_padding").index_first_axis
    return lambda x, positions: take(x, positions)


def with_mask(arguments: Arguments) -> Arguments:
    tensors, layout = arguments["tensors"], arguments["layout"]
    return {"tensors": tensors, "valid": valid_rows(layout, [t.shape[1] for t in tensors])}


def with_rows(arguments: Arguments) -> Arguments:
    valid = with_mask(arguments)["valid"]
    return {"tensors": arguments["tensors"], "rows": valid.flatten().nonzero().flatten()}


def with_gather_index(arguments: Arguments) -> Arguments:
    """int64 ``[B, longest sample]``: text from the front, then regions; a position past the end points at some row."""
    (text, _), lengths = arguments["tensors"], arguments["layout"].lengths.long()
    ends = lengths.sum(1, keepdim=True)
    position = torch.arange(int(ends.max()), device=lengths.device).repeat(len(lengths), 1)
    is_region = (position >= lengths[:, :1]) & (position < ends)
    index = torch.where(is_region, position - lengths[:, :1] + text.shape[1], position)
    return {"tensors": arguments["tensors"], "gather_index": index, "rows": (position < ends).flatten().nonzero().flatten()}


def with_padded_rows(arguments: Arguments) -> Arguments:
    layout = arguments["layout"]
    widths = layout.max_segment_lengths
    rows = valid_rows(layout, widths).flatten().nonzero().flatten()
    return {"x": arguments["x"], "rows": rows, "widths": widths, "samples": layout.num_samples}
