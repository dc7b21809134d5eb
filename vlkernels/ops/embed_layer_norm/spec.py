"""What the contract tests and the benchmarks know about ``embed_layer_norm``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.spec import Arguments, Case, InputMaker, OpSpec
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


def _benchmark(rows: int, width: int, **options: float) -> Callable[[InputMaker], Arguments]:
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


def _eager(
    ids: Tensor, tables: Sequence[Tensor], weight: Tensor, bias: Tensor, dropout_p: float = 0.0, **_: Any
) -> Tensor:
    """The same in plain PyTorch, with PyTorch's own dropout."""
    z = sum(F.embedding(ids[:, c], table) for c, table in enumerate(tables))
    return F.dropout(F.layer_norm(z, z.shape[1:], weight, bias, 1e-12), dropout_p)


SPECS = (
    OpSpec(
        name="embed_layer_norm",
        functional=functional.embed_layer_norm,
        reference=reference.embed_layer_norm,
        implementations=functional.IMPLEMENTATIONS,
        cases=(
            Case("bert", _bert),
            Case("mixed", _mixed),
            Case("dense_only", _dense_only),
            Case("frozen_table", _frozen_table),
        ),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        benchmarks={
            "BERT 8192x768": _benchmark(8192, 768),
            "BERT 2000x128, dropout": _benchmark(2000, 128, dropout_p=0.1),
        },
        peers={"eager": _eager},
    ),
)
