"""What the contract tests and the benchmarks know about ``embed_layer_norm``."""

from __future__ import annotations

import torch

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.spec import Arguments, Case, InputMaker, OpSpec
from vlkernels.ops.embed_layer_norm import benchmarks, functional, reference


def _bert(fill: InputMaker) -> Arguments:
    sizes = (50, 12, 2)
    return {
        "ids": benchmarks.ids(fill, 40, sizes),
        "tables": [fill.normal(size, 48) for size in sizes],
        "weight": fill.normal(48),
        "bias": fill.normal(48),
    }


def _mixed(fill: InputMaker) -> Arguments:
    """Text and region rows in one stream: ids are -1 where a term is absent; the layout keys the dropout."""
    layout = SegmentLayout([[5, 3], [0, 7], [4, 0]], capacity=24, sample_ids=[11, 3, 500])
    sizes, width = (20, 9), 77
    return {
        "ids": benchmarks.ids(fill, layout.num_tokens, sizes, low=-1).to(torch.int32),
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
    return {"ids": benchmarks.ids(fill, 70, (7, 2)), "tables": tables, "weight": None, "eps": 1e-5}


def _large_table(fill: InputMaker) -> Arguments:
    """More rows than stay in a cache: some unused, some used once, one often."""
    ids = torch.cat((benchmarks.ids(fill, 60, (4100,)), torch.full((20, 1), 4099, device=fill.device)))
    return {"ids": ids, "tables": [fill.normal(4100, 128)], "weight": fill.normal(128), "eps": 1e-5}


def _uniter(fill: InputMaker) -> Arguments:
    """Rows without text, without regions, and nobody's; no row has the third norm."""
    layout = SegmentLayout([[5, 3], [0, 7], [4, 0]], capacity=24, sample_ids=[11, 3, 500])
    return benchmarks.text_and_regions(fill, layout, width=77, sizes=(30, 12), num_norms=3)


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
        benchmarks=benchmarks.embed_layer_norm(),
        peers=benchmarks.PEERS,
        cost=benchmarks.cost,
    ),
)
