"""What the contract tests and the benchmarks know about ``embed_layer_norm``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.spec import Arguments, Case, InputMaker, OpSpec, Peer
from vlkernels.ops.embed_layer_norm import functional, reference


def _ids(fill: InputMaker, rows: int, sizes: Sequence[int], low: int = 0) -> Tensor:
    return torch.stack([fill.integers(low, size, (rows,)) for size in sizes], dim=1)


def _bert(fill: InputMaker) -> Arguments:
    sizes = (50, 12, 2)
    return {
        "ids": _ids(fill, 40, sizes),
        "tables": [fill.normal(size, 48) for size in sizes],
        "weight": fill.normal(48),
        "bias": fill.normal(48),
    }


def _mixed(fill: InputMaker) -> Arguments:
    """Text and region rows in one stream: ids are -1 where a term is absent; the layout keys the dropout."""
    layout = fill.layout([[5, 3], [0, 7], [4, 0]], capacity=24, sample_ids=[11, 3, 500])
    sizes, width = (20, 9), 77
    return {
        "ids": _ids(fill, layout.num_tokens, sizes, low=-1).to(torch.int32),
        "tables": [fill.normal(size, width) for size in sizes],
        "weight": fill.normal(width, dtype=torch.float32),
        "bias": fill.normal(width, dtype=torch.float32),
        "dense": fill.normal(layout.num_tokens, width),
        "dropout_p": 0.25,
        "layout": layout,
        "rng": fill.rng(),
        "stream": 3,
    }


def _dense_only(fill: InputMaker) -> Arguments:
    return {
        "ids": None,
        "tables": [],
        "weight": fill.normal(130),
        "dense": fill.normal(9, 130),
        "eps": 1e-6,
        "dropout_p": 0.1,
        "rng": fill.rng(),
    }


def _frozen_table(fill: InputMaker) -> Arguments:
    tables = [fill.normal(7, 160, grad=False), fill.normal(2, 160)]
    return {"ids": _ids(fill, 70, (7, 2)), "tables": tables, "weight": None, "eps": 1e-5}


def _large_table(fill: InputMaker) -> Arguments:
    """More rows than stay in a cache: some unused, some used once, one often."""
    ids = torch.cat((_ids(fill, 60, (4100,)), torch.full((20, 1), 4099, device=fill.device)))
    return {"ids": ids, "tables": [fill.normal(4100, 128)], "weight": fill.normal(128), "eps": 1e-5}


def _text_and_regions(
    fill: InputMaker, layout: SegmentLayout, width: int, sizes: tuple[int, int], num_norms: int = 2
) -> Arguments:
    """UNITER's embedder: rows of words and positions have one norm, computed rows of regions another."""
    segment = layout.token_segment().long()
    text, region = segment == 0, segment == 1
    region_rows = torch.where(region, region.cumsum(0) - 1, -1)
    words = fill.integers(0, sizes[0], (layout.num_tokens,))
    positions = layout.token_position()
    columns = (torch.where(text, words, -1), torch.where(text, positions, -1), segment, region_rows)
    return {
        "ids": torch.stack(columns, dim=1),
        "tables": [fill.normal(size, width) for size in (*sizes, 2, int(region.sum()))],
        "weight": fill.normal(num_norms, width),
        "bias": fill.normal(num_norms, width),
        "norm_ids": segment,
        "layout": layout,
        "rng": fill.rng(),
        "dropout_p": 0.1,
    }


def _uniter(fill: InputMaker) -> Arguments:
    """Rows without text, without regions, and nobody's; no row has the third norm."""
    layout = fill.layout([[5, 3], [0, 7], [4, 0]], capacity=24, sample_ids=[11, 3, 500])
    return _text_and_regions(fill, layout, width=77, sizes=(30, 12), num_norms=3)


def _nothing_to_add(fill: InputMaker) -> Arguments:
    """Every id is -1: the sum is zero, its norm the bias."""
    return {
        "ids": torch.full((5, 2), -1, device=fill.device),
        "tables": [fill.normal(3, 40), fill.normal(2, 40)],
        "weight": fill.normal(2, 40, dtype=torch.float32),
        "bias": fill.normal(2, 40),
        "norm_ids": torch.tensor([1, 0, 0, 1, 0], dtype=torch.int32, device=fill.device),
        "eps": 1e-5,
    }


def _norms_without_bias(fill: InputMaker) -> Arguments:
    return {
        "ids": None,
        "tables": [],
        "weight": fill.normal(4, 64),
        "dense": fill.normal(200, 64),
        "norm_ids": fill.integers(-1, 4, (200,)),
    }


def _bert_benchmark(rows: int, width: int, **options: float) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        sizes = (30522, 512, 2)
        tables = [fill.normal(size, width) for size in sizes]
        return {
            "ids": _ids(fill, rows, sizes),
            "tables": tables,
            "weight": fill.normal(width),
            "bias": fill.normal(width),
            **options,
        }

    return make


def _uniter_benchmark(fill: InputMaker) -> Arguments:
    """Captions of 20 tokens and 36 regions on average, about 8192 rows."""
    lengths = torch.stack((fill.integers(8, 33, (146,)), fill.integers(10, 63, (146,))), dim=1)
    return _text_and_regions(fill, fill.layout(lengths.cpu()), width=768, sizes=(28996, 512))


def _eager(
    ids: Tensor,
    tables: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    dropout_p: float = 0.0,
    norm_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Plain PyTorch with its own dropout; several norms each on their own rows, then gathered into order."""

    def normed(terms: list[tuple[Tensor | None, Tensor]], weight: Tensor, bias: Tensor) -> Tensor:
        z = sum(table if column is None else F.embedding(column, table) for column, table in terms)
        return F.dropout(F.layer_norm(z, z.shape[1:], weight, bias, 1e-12), dropout_p)

    inputs = [*tables, weight, bias]
    if norm_ids is None:
        every = _terms(ids, tables)
        return lambda: normed(every, weight, bias), inputs
    rows = [(norm_ids == norm).nonzero().flatten() for norm in range(weight.shape[0])]
    order = torch.cat(rows).argsort()
    per_norm = [_terms(ids[chosen], tables) for chosen in rows]
    return lambda: torch.cat(list(map(normed, per_norm, weight, bias))).index_select(0, order), inputs


def _terms(ids: Tensor, tables: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    """The tables these rows use, with their ids; without, where the rows are the table's as they stand."""
    terms = []
    for column, table in zip(ids.unbind(1), tables, strict=True):
        if torch.equal(column, torch.arange(len(table), device=column.device)):
            terms.append((None, table))
        elif (column >= 0).all():
            terms.append((column, table))
    return terms


SPECS = (
    OpSpec(
        name="embed_layer_norm",
        functional=functional.embed_layer_norm,
        reference=reference.embed_layer_norm,
        implementations=functional.IMPLEMENTATIONS,
        cases=(
            Case("uniter", _uniter),
            Case("bert", _bert),
            Case("mixed", _mixed),
            Case("dense_only", _dense_only),
            Case("frozen_table", _frozen_table),
            Case("large_table", _large_table),
            Case("nothing_to_add", _nothing_to_add),
            Case("norms_without_bias", _norms_without_bias),
        ),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        benchmarks={
            "BERT 8192x768": _bert_benchmark(8192, 768),
            "BERT 2000x128, dropout": _bert_benchmark(2000, 128, dropout_p=0.1),
            "UNITER 8192x768, dropout": _uniter_benchmark,
        },
        peers={"eager": Peer(_eager)},
    ),
)
