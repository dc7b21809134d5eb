"""What packing is timed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.peers import Build, compiled, loaded, rival
from vlkernels.core.spec import Arguments, Benchmark, Cost, InputMaker, Peer
from vlkernels.ops.packing import functional, peers

BATCH, TEXT, IMAGE, WIDTH = 64, 60, 196, 768
BOTH = ((0,), (1,))
DTYPES = (torch.float32, torch.bfloat16)
# (samples, width), the most telling first, which is also timed in float32; (rows, width) of masked tokens' streams
CARD_BATCHES = ((256, 768), (256, 1024), (1024, 768), (32, 768))
CARD_STREAMS = ((65_536, 768), (65_536, 1024), (4_096, 768))
TAKEN = 0.15


def _lengths(fill: InputMaker, samples: int, longest: Sequence[int]) -> SegmentLayout:
    """Captions and regions: from a fifth of the longest to the longest, so that two rows in five are padding."""
    drawn = [fill.counts(most // 5, most + 1, (samples, 1)) for most in longest]
    return fill.layout(torch.cat(drawn, dim=1))


def _typical(fill: InputMaker) -> tuple[tuple[Tensor, Tensor], SegmentLayout]:
    layout = _lengths(fill, BATCH, (TEXT, IMAGE))
    return (fill.normal(BATCH, TEXT, WIDTH), fill.normal(BATCH, IMAGE, WIDTH)), layout


def _pack_on_cpu(fill: InputMaker) -> Arguments:
    tensors, layout = _typical(fill)
    return {"tensors": tensors, "layout": layout}


def _packed(fill: InputMaker) -> Arguments:
    layout = _typical(fill)[1]
    return {"x": fill.normal(layout.num_tokens, WIDTH), "layout": layout}


def _rows_on_cpu(fill: InputMaker) -> Arguments:
    x = fill.normal(BATCH * (TEXT + IMAGE), WIDTH)
    return {"x": x, "positions": fill.integers(0, len(x), (len(x) // 8,))}


def _put(fill: InputMaker) -> Arguments:
    layout = _typical(fill)[1]
    rows = tuple(fill.normal(total, WIDTH) for total in layout.segment_totals)
    return {"rows": rows, "layout": layout, "segments": BOTH}


PACK_PEERS = {
    "cat + gather": peers.pack_by_gather,
    "cat + index_select": peers.pack_by_index,
    "cat + boolean index": peers.pack_by_mask,
}
UNPACK_PEERS = {"masked_scatter + split": peers.unpack_by_mask}
TAKE_ROWS_PEERS = {"index_select": peers.select_rows}


def _rivals(builds: Mapping[str, Build], ours: Callable[..., Any]) -> dict[str, Peer]:
    return {name: rival(build, ours) for name, build in builds.items()}


CARD_PACK_PEERS = _rivals(
    {
        "cat + index_select, index ready": loaded(lambda: peers.cat_and_select, peers.with_rows),
        "cat + index_select, compiled, index ready": compiled(loaded(lambda: peers.cat_and_select, peers.with_rows)),
        "UNITER's cat + gather, then unpad, indices ready": loaded(lambda: peers.uniter, peers.with_gather_index),
        "cat + flash-attn's unpad_input": loaded(peers.bert_padding_pack, peers.with_mask),
    },
    functional.pack,
)
CARD_UNPACK_PEERS = _rivals(
    {
        "zeros + index_copy, index ready": loaded(lambda: peers.zeros_and_copy, peers.with_padded_rows),
        "zeros + index_copy, compiled, index ready": compiled(loaded(lambda: peers.zeros_and_copy, peers.with_padded_rows)),
        "flash-attn's pad_input, index ready": loaded(peers.bert_padding_unpack, peers.with_padded_rows),
    },
    functional.unpack,
)
CARD_TAKE_ROWS_PEERS = _rivals(
    {
        "index_select": loaded(lambda: peers.select_rows),
        "torch.compile": compiled(loaded(lambda: peers.select_rows)),
        "flash-attn's index_first_axis": loaded(peers.bert_padding_rows),
    },
    functional.take_rows,
)


def pack(shrink: int = 1) -> dict[str, Benchmark]:
    def make(fill: InputMaker, layout: SegmentLayout, width: int) -> Arguments:
        return {"tensors": tuple(fill.drawn(layout.num_samples, longest, width) for longest in (TEXT, IMAGE)), "layout": layout}

    return {"captions and regions": _cpu(_pack_on_cpu), **_batches(make, CARD_PACK_PEERS, shrink)}


def unpack(shrink: int = 1) -> dict[str, Benchmark]:
    def make(fill: InputMaker, layout: SegmentLayout, width: int) -> Arguments:
        return {"x": fill.drawn(layout.num_tokens, width), "layout": layout}

    return {"captions and regions": _cpu(_packed), **_batches(make, CARD_UNPACK_PEERS, shrink)}


def take_rows(shrink: int = 1) -> dict[str, Benchmark]:
    rows = {"one row in eight": _cpu(_rows_on_cpu)}
    for position, (count, width) in enumerate(CARD_STREAMS):
        make = _masked_rows(count // shrink, max(8, width // shrink))
        rows[f"{TAKEN:.0%} of {count} rows, D{width}"] = _card(make, position, CARD_TAKE_ROWS_PEERS)
    return rows


def take_segments() -> dict[str, Benchmark]:
    return {"both streams": _both(lambda fill: {**_packed(fill), "segments": BOTH})}


def put_segments() -> dict[str, Benchmark]:
    return {"both streams": _both(_put)}


def segment_mean() -> dict[str, Benchmark]:
    return {"regions": _both(lambda fill: {**_packed(fill), "segment": 1})}


def _both(make: Callable[[InputMaker], Arguments]) -> Benchmark:
    return Benchmark(make, dtypes=DTYPES)


def _cpu(make: Callable[[InputMaker], Arguments]) -> Benchmark:
    return Benchmark(make, ("cpu",), DTYPES)


def _card(make: Callable[[InputMaker], Arguments], position: int, beside: Mapping[str, Peer]) -> Benchmark:
    return Benchmark(make, ("cuda",), (torch.bfloat16,) if position else (torch.bfloat16, torch.float32), beside)


def _batches(
    make: Callable[[InputMaker, SegmentLayout, int], Arguments], beside: Mapping[str, Peer], shrink: int
) -> dict[str, Benchmark]:
    """The batches of a card; ``shrink`` makes them small, for a trial of the code."""

    def of(samples: int, width: int) -> Callable[[InputMaker], Arguments]:
        return lambda fill: make(fill, _lengths(fill, samples, (TEXT, IMAGE)), width)

    lengths = " + ".join(f"{longest // 5}..{longest}" for longest in (TEXT, IMAGE))
    return {
        f"{samples} x {lengths}, D{width}": _card(of(max(3, samples // shrink), max(8, width // shrink)), position, beside)
        for position, (samples, width) in enumerate(CARD_BATCHES)
    }


def _masked_rows(count: int, width: int) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: round(TAKEN * count)]
        return {"x": fill.drawn(count, width), "positions": drawn.sort().values.to(fill.device)}

    return make


def pack_cost(tensors: Sequence[Tensor], layout: SegmentLayout) -> Cost:
    """Every row is read and written once; the backward also writes the padding's zeros."""
    padded = sum(t.shape[0] * t.shape[1] for t in tensors)
    return _cost(tensors[0][0, 0], 2 * layout.num_tokens, layout.num_tokens + padded)


def unpack_cost(x: Tensor, layout: SegmentLayout) -> Cost:
    """As of pack, with the directions exchanged."""
    padded = layout.num_samples * sum(layout.max_segment_lengths)
    return _cost(x[0], layout.num_tokens + padded, 2 * layout.num_tokens)


def take_rows_cost(x: Tensor, positions: Tensor) -> Cost:
    """The backward writes every row of ``x``."""
    return _cost(x[0], 2 * len(positions), len(positions) + len(x))


def moved_cost(layout: SegmentLayout, x: Tensor | None = None, rows: Sequence[Tensor] = (), **_: Any) -> Cost:
    """Of take_segments and put_segments where every row is taken or put."""
    return _cost(rows[0][0] if x is None else x[0], 2 * layout.num_tokens, 2 * layout.num_tokens)


def segment_mean_cost(x: Tensor, layout: SegmentLayout, segment: int) -> Cost:
    total = layout.segment_totals[segment]
    return _cost(x[0], total + layout.num_samples, layout.num_samples + layout.num_tokens)


def _cost(row: Tensor, forward_rows: int, backward_rows: int) -> Cost:
    row_bytes = row.numel() * row.element_size()
    return Cost(forward_bytes=forward_rows * row_bytes, backward_bytes=backward_rows * row_bytes)
