"""What ``embed_layer_norm`` is timed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.peers import compiled, rival
from vlkernels.core.spec import Arguments, Benchmark, Cost, InputMaker, Peer
from vlkernels.ops.embed_layer_norm import functional, peers

BERT = (30_522, 512, 2)  # words, positions, types
UNITER = (28_996, 512)
# (rows, width), the most telling first, which is also timed in float32; samples of UNITER's of some 56 rows each
CARD_BERT = ((65_536, 768), (16_384, 768), (4_096, 768), (65_536, 1024))
CARD_UNITER = ((1_168, 768), (292, 768))


def ids(fill: InputMaker, rows: int, sizes: Sequence[int], low: int = 0) -> Tensor:
    return torch.stack([fill.integers(low, size, (rows,)) for size in sizes], dim=1)


def text_and_regions(
    fill: InputMaker, layout: SegmentLayout, width: int, sizes: tuple[int, int], num_norms: int = 2
) -> Arguments:
    """UNITER's embedder, its layout still on the host: rows of words and positions have one norm, computed rows of regions another."""
    segment = layout.token_segment().long()
    text, region = segment == 0, segment == 1
    region_rows = torch.where(region, region.cumsum(0) - 1, -1)
    words = fill.counts(0, sizes[0], (layout.num_tokens,))
    positions = layout.token_position()
    columns = (torch.where(text, words, -1), torch.where(text, positions, -1), segment, region_rows)
    return {
        "ids": torch.stack(columns, dim=1).to(fill.device),
        "tables": [fill.normal(size, width) for size in (*sizes, 2, int(region.sum()))],
        "weight": fill.normal(num_norms, width),
        "bias": fill.normal(num_norms, width),
        "norm_ids": segment.to(fill.device),
        "layout": layout.to(fill.device),
        "rng": fill.rng(),
        "dropout_p": 0.1,
    }


def cost(ids: Tensor | None, tables: Sequence[Tensor], weight: Tensor | None, dense: Tensor | None = None, **_: Any) -> Cost:
    """Each table row that is named is read once, each row of a table gets a gradient; ids and parameters are not counted."""
    like = tables[0] if dense is None else dense
    rows = len(ids if dense is None else dense)
    named = sum(int((column.unique() >= 0).sum()) for column in ids.unbind(1)) if tables else 0
    read = named + (0 if dense is None else rows)
    written = sum(len(table) for table in tables) + (0 if dense is None else rows)
    row_bytes = like.shape[1] * like.element_size()
    return Cost(forward_bytes=(read + rows) * row_bytes, backward_bytes=(rows + read + written) * row_bytes)


def _bert(rows: int, width: int, sizes: Sequence[int] = BERT, **options: float) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        tables = [fill.normal(size, width) for size in sizes]
        own = {"ids": ids(fill, rows, sizes), "tables": tables, "weight": fill.normal(width), "bias": fill.normal(width)}
        return {**own, **options, **({"rng": fill.rng()} if options else {})}

    return make


def _uniter(samples: int, width: int, sizes: tuple[int, int] = UNITER) -> Callable[[InputMaker], Arguments]:
    """Captions of 20 tokens and 36 regions on average."""

    def make(fill: InputMaker) -> Arguments:
        lengths = torch.stack((fill.counts(8, 33, (samples,)), fill.counts(10, 63, (samples,))), dim=1)
        return text_and_regions(fill, SegmentLayout(lengths), width, sizes)

    return make


PEERS = {"eager": Peer(lambda **given: peers.eager(**given)[:2])}
CARD_PEERS = {
    "eager": rival(peers.eager, functional.embed_layer_norm),
    "torch.compile": rival(compiled(peers.eager), functional.embed_layer_norm),
}


def embed_layer_norm(shrink: int = 1) -> dict[str, Benchmark]:
    """``shrink`` makes the rows of a card small, for a trial of the code."""
    rows = {
        "BERT 8192x768": _cpu(_bert(8192, 768)),
        "BERT 2000x128, dropout": _cpu(_bert(2000, 128, dropout_p=0.1)),
        "UNITER 8192x768, dropout": _cpu(_uniter(146, 768)),
    }
    bert, uniter = (BERT, UNITER) if shrink == 1 else ((50, 12, 2), (40, 33))
    for position, (count, width) in enumerate(CARD_BERT):
        make = _bert(max(4, count // shrink), max(8, width // shrink), bert, dropout_p=0.1)
        rows[f"BERT {count}x{width}, dropout 0.1"] = _card(make, position)
    for position, (samples, width) in enumerate(CARD_UNITER, 1):
        make = _uniter(max(4, samples // shrink), max(8, width // shrink), uniter)
        rows[f"UNITER, {samples} x 8..32 + 10..62, D{width}, dropout 0.1"] = _card(make, position)
    return rows


def _cpu(make: Callable[[InputMaker], Arguments]) -> Benchmark:
    return Benchmark(make, ("cpu",), (torch.float32, torch.bfloat16), PEERS)


def _card(make: Callable[[InputMaker], Arguments], position: int) -> Benchmark:
    return Benchmark(make, ("cuda",), (torch.bfloat16,) if position else (torch.bfloat16, torch.float32), CARD_PEERS)
