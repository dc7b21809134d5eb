"""What the contract tests and the benchmarks know about packing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.spec import Arguments, Case, InputMaker, OpSpec
from vlkernels.ops.packing import benchmarks, functional, peers, reference
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
        benchmarks=benchmarks.pack(),
        peers=benchmarks.PACK_PEERS,
        cost=benchmarks.pack_cost,
    ),
    _spec(
        "unpack",
        _cases(_unpack_case),
        benchmarks=benchmarks.unpack(),
        peers=benchmarks.UNPACK_PEERS,
        cost=benchmarks.unpack_cost,
    ),
    _spec(
        "take_segments",
        _cases(_take_case),
        benchmarks=benchmarks.take_segments(),
        peers={"boolean index": peers.take_by_mask},
        cost=benchmarks.moved_cost,
    ),
    _spec(
        "put_segments",
        _cases(_put_case),
        benchmarks=benchmarks.put_segments(),
        peers={"boolean index_put": peers.put_by_mask},
        cost=benchmarks.moved_cost,
    ),
    _spec(
        "take_rows",
        TAKE_ROWS_CASES,
        benchmarks=benchmarks.take_rows(),
        peers=benchmarks.TAKE_ROWS_PEERS,
        cost=benchmarks.take_rows_cost,
    ),
    _spec(
        "segment_mean",
        _cases(_mean_case),
        benchmarks=benchmarks.segment_mean(),
        peers={"index_add": peers.mean_by_index_add},
        cost=benchmarks.segment_mean_cost,
    ),
)
