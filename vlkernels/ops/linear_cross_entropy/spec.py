"""What the linear cross-entropy declares about itself."""

from __future__ import annotations

from typing import Any

import torch

from vlkernels.core.spec import Arguments, Case, InputMaker, OpSpec
from vlkernels.ops.linear_cross_entropy import benchmarks, functional, reference
from vlkernels.ops.linear_cross_entropy.gpu import variants

IGNORED = -100


def _rows(
    fill: InputMaker, rows: int, width: int, entries: int, ignored: float = 0.3, **options: Any
) -> Arguments:
    targets = fill.integers(0, entries, (rows,))
    dropped = fill.integers(0, 100, (rows,)) < 100 * ignored
    return {
        "hidden": fill.normal(rows, width),
        "weight": fill.normal(entries, width, scale=2 / width**0.5),
        "bias": fill.normal(entries),
        "targets": torch.where(dropped, IGNORED, targets),
    } | options


def _without_bias(fill: InputMaker) -> Arguments:
    arguments = _rows(fill, 31, 16, 77)
    return {name: value for name, value in arguments.items() if name != "bias"}


def _confident(fill: InputMaker) -> Arguments:
    """Targets the classifier already knows: a loss near zero, gradients made of small differences."""
    weight = fill.normal(40, 24, grad=False, scale=1.5)
    return {
        "hidden": weight[:20].clone().requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": torch.arange(20, device=fill.device),
    }


def _extreme(fill: InputMaker) -> Arguments:
    """Logits of some thousands, a few of them level, and an entry that nothing can reach."""
    arguments = _rows(fill, 19, 16, 90, label_smoothing=0.0)
    with torch.no_grad():
        arguments["hidden"] *= 2048
        arguments["weight"][40:44] = arguments["weight"][40]
        arguments["bias"][40:44] = 0
        arguments["bias"][7] = -1e30
    arguments["targets"][arguments["targets"] == 7] = 8
    return arguments


def _taught(fill: InputMaker, **options: Any) -> Arguments:
    teacher = (
        fill.normal(24, 12, grad=False),
        fill.normal(50, 12, grad=False, scale=0.5),
        fill.normal(50, grad=False),
    )
    return _rows(fill, 24, 16, 50) | {"teacher": teacher} | options


CASES = (
    Case("mean", lambda fill: _rows(fill, 40, 24, 130)),
    Case("sum", lambda fill: _rows(fill, 17, 8, 51, reduction="sum")),
    Case("none", lambda fill: _rows(fill, 23, 16, 66, reduction="none")),
    Case("without_bias", _without_bias),
    Case("confident", _confident),
    Case("extreme", _extreme),
    Case("longer_than_a_tile", lambda fill: _rows(fill, 67, 24, 1100, label_smoothing=0.1, z_loss=1e-2)),
    Case("smoothed", lambda fill: _rows(fill, 30, 16, 70, label_smoothing=0.1)),
    Case("z_loss", lambda fill: _rows(fill, 30, 16, 70, z_loss=1e-2, label_smoothing=0.05)),
    Case("z_loss_none", lambda fill: _rows(fill, 30, 16, 70, z_loss=1e-2, reduction="none")),
    Case("taught", lambda fill: _taught(fill, distillation=0.4)),
    Case(
        "taught_softly",
        lambda fill: _taught(fill, distillation=0.7, temperature=2.0, z_loss=1e-3, label_smoothing=0.1),
    ),
    Case("taught_none", lambda fill: _taught(fill, distillation=1.0, temperature=2.0, reduction="none")),
    Case("all_ignored", lambda fill: _rows(fill, 9, 8, 20, ignored=1.0)),
    Case("one_entry", lambda fill: _rows(fill, 5, 8, 1)),
    Case("empty", lambda fill: _rows(fill, 0, 8, 20)),
    Case("empty_none", lambda fill: _rows(fill, 0, 8, 20, reduction="none")),
)


SPECS = (
    OpSpec(
        name="linear_cross_entropy",
        functional=functional.linear_cross_entropy,
        reference=reference.linear_cross_entropy,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        benchmarks=benchmarks.benchmarks(),
        peers=benchmarks.PEERS,
        cost=benchmarks.cost,
        variants=variants.variants,
    ),
)
