"""What the contract tests and the benchmarks know about ``layer_norm`` and ``rms_norm``."""

from __future__ import annotations

import torch

from vlkernels.core.spec import Arguments, Case, InputMaker, OpSpec
from vlkernels.ops.layer_norm import benchmarks, functional, peers, reference


def _plain(fill: InputMaker) -> Arguments:
    return {"x": fill.normal(7, 48), "weight": fill.normal(48), "bias": fill.normal(48)}


def _bare(fill: InputMaker) -> Arguments:
    return {"x": fill.normal(3, 4, 33), "weight": None, "bias": None, "eps": 1e-3}


def _residual(fill: InputMaker) -> Arguments:
    return {**_plain(fill), "residual": fill.normal(7, 48), "return_sum": True}


def _everything(fill: InputMaker) -> Arguments:
    layout = fill.layout([[5, 3], [0, 7], [4, 0]], capacity=24, sample_ids=[11, 3, 500])
    rows, width = layout.num_tokens, 77
    return {
        "x": fill.normal(rows, width),
        "weight": fill.normal(width, dtype=torch.float32),
        "bias": fill.normal(width, dtype=torch.float32),
        "residual": fill.normal(rows, width),
        "linear_bias": fill.normal(width),
        "dropout_p": 0.25,
        "row_scale": fill.normal(rows, grad=False, dtype=torch.float32),
        "rng": fill.rng(),
        "stream": 3,
        "layout": layout,
        "return_sum": True,
    }


def _dropout(fill: InputMaker) -> Arguments:
    return {
        "x": fill.normal(2, 35, 64),
        "weight": fill.normal(64),
        "bias": None,
        "linear_bias": fill.normal(64),
        "dropout_p": 0.1,
        "rng": fill.rng(),
    }


def _row_scale(fill: InputMaker) -> Arguments:
    scale = fill.integers(0, 2, (9,)).to(torch.float32)
    return {**_plain(fill), "x": fill.normal(9, 48), "residual": fill.normal(9, 48), "row_scale": scale}


def _no_rows(fill: InputMaker) -> Arguments:
    return {**_plain(fill), "x": fill.normal(0, 48), "residual": fill.normal(0, 48), "return_sum": True}


def _no_columns(fill: InputMaker) -> Arguments:
    return {"x": fill.normal(3, 0), "weight": fill.normal(0), "bias": fill.normal(0), "dropout_p": 0.1, "rng": fill.rng()}


def _large_mean(fill: InputMaker) -> Arguments:
    x = (fill.normal(40, 48, grad=False) + 64).requires_grad_()
    return {"x": x, "weight": fill.normal(48), "bias": fill.normal(48)}


CASES = (
    Case("plain", _plain),
    Case("bare", _bare),
    Case("residual", _residual),
    Case("everything", _everything),
    Case("dropout", _dropout),
    Case("row_scale", _row_scale),
    Case("large_mean", _large_mean),
    Case("no_rows", _no_rows),
    Case("no_columns", _no_columns),
)


def without_bias(case: Case) -> Case:
    """The case for ``rms_norm``."""

    def make(fill: InputMaker) -> Arguments:
        arguments = case.make(fill)
        del arguments["bias"]
        return arguments

    return Case(case.name, make)


SPECS = (
    OpSpec(
        name="layer_norm",
        functional=functional.layer_norm,
        reference=reference.layer_norm,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        benchmarks=benchmarks.layer_norm(),
        peers={"eager": peers.eager},
        cost=benchmarks.cost,
    ),
    OpSpec(
        name="rms_norm",
        functional=functional.rms_norm,
        reference=reference.rms_norm,
        implementations=functional.IMPLEMENTATIONS,
        cases=tuple(without_bias(case) for case in CASES),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        benchmarks=benchmarks.rms_norm(),
        peers={"eager": peers.eager_rms},
        cost=benchmarks.cost,
    ),
)
