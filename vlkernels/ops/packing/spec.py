"""Packing's cases, benchmarks and peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.spec import Arguments, Case, Cost, InputMaker, OpSpec
from vlkernels.ops.packing import functional, reference
from vlkernels.ops.packing.functional import IMPLEMENTATIONS

LENGTHS = [[3, 5], [0, 4], [7, 0], [0, 0], [2, 6]]
THREE = [[2, 3, 1], [4, 0, 2], [0, 0, 0], [1, 5, 3]]
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def _gaps(fill: InputMaker) -> SegmentLayout:
    return SegmentLayout.padded([4, 0, 6, 3], max_len=6).to(fill.device)


def _taken(fill: InputMaker) -> SegmentLayout:
    """Hard negatives: drawn on the device, which alone knows their lengths; nobody's rows at the end."""
    return fill.layout(LENGTHS).take(fill.integers(0, len(LENGTHS), (4,)))


LAYOUTS: dict[str, Callable[[InputMaker], SegmentLayout]] = {
    "two segments": lambda fill: fill.layout(LENGTHS),
    "three segments, capacity": lambda fill: fill.layout(THREE, capacity=32),
    "padded": _gaps,
    "taken": _taken,
    "one sample": lambda fill: fill.layout([[3, 2]]),
    "no sample": lambda fill: fill.layout(torch.zeros(0, 2, dtype=torch.int64), capacity=5),
}


def _cases(make: Callable[[InputMaker, SegmentLayout], Arguments]) -> tuple[Case, ...]:
    """The op on every layout."""
    return tuple(Case(name, lambda fill, lay=lay: make(fill, lay(fill))) for name, lay in LAYOUTS.items())


def _packed(fill: InputMaker, layout: SegmentLayout) -> Tensor:
    return fill.normal(layout.num_tokens, 6)


def _padded(fill: InputMaker, layout: SegmentLayout) -> tuple[Tensor, ...]:
    return tuple(fill.normal(layout.num_samples, longest + 1, 6) for longest in layout.max_segment_lengths)


def _streams(layout: SegmentLayout) -> tuple[tuple[int, ...], ...]:
    """One group or two, the last segments first."""
    segments = range(layout.num_segments)
    return (tuple(reversed(segments[1:])), (0,)) if len(segments) > 1 else ((0,),)


def _rows(fill: InputMaker, layout: SegmentLayout) -> tuple[Tensor, ...]:
    return tuple(fill.normal(layout.select(stream).num_tokens, 6) for stream in _streams(layout))


def _ids(fill: InputMaker) -> Arguments:
    layout = fill.layout(LENGTHS)
    shapes = [(layout.num_samples, longest) for longest in layout.max_segment_lengths]
    return {"tensors": [fill.integers(0, 999, shape) for shape in shapes], "layout": layout}


def _rows_case(name: str, positions: Sequence[int], shape: Sequence[int] = (9, 6), **options: Any) -> Case:
    def make(fill: InputMaker) -> Arguments:
        index = torch.tensor(positions, dtype=torch.int64, device=fill.device)
        return {"x": fill.normal(*shape), "positions": index, **options}

    return Case(name, make)


TAKE_ROWS_CASES = (
    _rows_case("each once", [4, 0, 8, 2]),
    _rows_case("duplicates and none", [3, 3, -1, 0, 3, 8, -1, 0], capacity=11),
    _rows_case("wide rows", [1, 1, 0, 1], shape=(2, 3, 400)),
    _rows_case("nothing", [], capacity=3),
)

BATCH, TEXT, IMAGE, WIDTH = 64, 60, 196, 768
BOTH = ((0,), (1,))


def _typical(fill: InputMaker) -> tuple[tuple[Tensor, Tensor], SegmentLayout]:
    """Captions and regions of a batch, about half of it padding."""
    text, image = (fill.integers(longest // 5, longest + 1, (BATCH, 1)).cpu() for longest in (TEXT, IMAGE))
    layout = fill.layout(torch.cat((text, image), dim=1))
    return (fill.normal(BATCH, TEXT, WIDTH), fill.normal(BATCH, IMAGE, WIDTH)), layout


def _bench_pack(fill: InputMaker) -> Arguments:
    tensors, layout = _typical(fill)
    return {"tensors": tensors, "layout": layout}


def _bench_packed(fill: InputMaker) -> Arguments:
    layout = _typical(fill)[1]
    return {"x": fill.normal(layout.num_tokens, WIDTH), "layout": layout}


def _bench_rows(fill: InputMaker) -> Arguments:
    x = fill.normal(BATCH * (TEXT + IMAGE), WIDTH)
    return {"x": x, "positions": fill.integers(0, len(x), (len(x) // 8,))}


def _bench_put(fill: InputMaker) -> Arguments:
    layout = _typical(fill)[1]
    rows = tuple(fill.normal(total, WIDTH) for total in layout.segment_totals)
    return {"rows": rows, "layout": layout, "segments": BOTH}


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


def _copy_cost(rows: int, zero_rows: int, row: Tensor) -> Cost:
    """Every row is read and written once; the backward also writes the padding's zeros."""
    row_bytes = row.numel() * row.element_size()
    return Cost(forward_bytes=2 * rows * row_bytes, backward_bytes=(2 * rows + zero_rows) * row_bytes)


def _pack_cost(tensors: Sequence[Tensor], layout: SegmentLayout) -> Cost:
    padded_rows = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors)
    return _copy_cost(layout.num_tokens, padded_rows - layout.num_tokens, tensors[0][0, 0])


def _spec(name: str, cases: Sequence[Case], **options: Any) -> OpSpec:
    return OpSpec(
        name=name,
        functional=getattr(functional, name),
        reference=getattr(reference, name),
        implementations=IMPLEMENTATIONS,
        cases=cases,
        dtypes=FLOATING,
        **options,
    )

def _pack_case(fill: InputMaker, layout: SegmentLayout) -> Arguments:
    return {"tensors": _padded(fill, layout), "layout": layout}


def _unpack_case(fill: InputMaker, layout: SegmentLayout) -> Arguments:
    return {"x": _packed(fill, layout), "layout": layout}


def _take_case(fill: InputMaker, layout: SegmentLayout) -> Arguments:
    return {**_unpack_case(fill, layout), "segments": _streams(layout)}


def _put_case(fill: InputMaker, layout: SegmentLayout) -> Arguments:
    return {"rows": _rows(fill, layout), "layout": layout, "segments": _streams(layout)}


def _mean_case(fill: InputMaker, layout: SegmentLayout) -> Arguments:
    return {**_unpack_case(fill, layout), "segment": layout.num_segments - 1}


SPECS = (
    _spec(
        "pack",
        (*_cases(_pack_case), Case("ids", _ids)),
        benchmarks={"captions and regions": _bench_pack},
        peers={
            "cat + gather": pack_by_gather,
            "cat + index_select": pack_by_index,
            "cat + boolean index": pack_by_mask,
        },
        cost=_pack_cost,
    ),
    _spec(
        "unpack",
        _cases(_unpack_case),
        benchmarks={"captions and regions": _bench_packed},
        peers={"masked_scatter + split": unpack_by_mask},
    ),
    _spec(
        "take_segments",
        _cases(_take_case),
        benchmarks={"both streams": lambda fill: {**_bench_packed(fill), "segments": BOTH}},
        peers={"boolean index": take_by_mask},
    ),
    _spec(
        "put_segments",
        _cases(_put_case),
        benchmarks={"both streams": _bench_put},
        peers={"boolean index_put": put_by_mask},
    ),
    _spec(
        "take_rows",
        TAKE_ROWS_CASES,
        benchmarks={"one row in eight": _bench_rows},
        peers={"index_select": lambda x, positions: x.index_select(0, positions)},
    ),
    _spec(
        "segment_mean",
        _cases(_mean_case),
        benchmarks={"regions": lambda fill: {**_bench_packed(fill), "segment": 1}},
        peers={"index_add": mean_by_index_add},
    ),
)
