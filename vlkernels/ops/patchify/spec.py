"""Patchify's cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlkernels.core.spec import Arguments, Case, InputMaker, OpSpec
from vlkernels.ops.patchify import benchmarks, functional, reference
from vlkernels.ops.patchify.benchmarks import patch_counts

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def _equal(name: str, shape: Sequence[int], patch_size: int, **options: Any) -> Case:
    """Images that fill their tensor, alone in their layout."""

    def make(fill: InputMaker) -> Arguments:
        batch, _, height, width = shape
        layout = fill.layout([[n] for n in patch_counts([(height, width)] * batch, patch_size)])
        return {"images": fill.normal(*shape), "layout": layout, "patch_size": patch_size, **options}

    return Case(name, make)


def _native(name: str, sizes: Sequence[Sequence[int]], patch_size: int, is_byte: bool = False, **options: Any) -> Case:
    """Images of their own sizes, one of two segments beside text."""

    def make(fill: InputMaker) -> Arguments:
        height, width = (max(side) + 3 for side in zip(*sizes))
        layout = fill.layout([[b, n] for b, n in enumerate(patch_counts(sizes, patch_size))], capacity=99)
        shape = (len(sizes), 3, height, width)
        images = fill.integers(0, 256, shape).to(torch.uint8) if is_byte else fill.normal(*shape)
        chosen = {"dtype": fill.dtype} if is_byte else {}
        at = torch.tensor(sizes, device=fill.device)
        return {"images": images, "layout": layout, "patch_size": patch_size, "sizes": at, "segment": 1, **chosen, **options}

    return Case(name, make)


def _taken(fill: InputMaker) -> Arguments:
    """Samples drawn on the device, which alone knows their lengths: rows of nobody at the end, which stay zero."""
    index = torch.tensor([1, 1, 3, 2], device=fill.device)
    sizes = torch.tensor(SIZES, device=fill.device)[index]
    layout = fill.layout([[n] for n in patch_counts(SIZES, 4)]).take(index)
    return {"images": fill.normal(4, 3, 30, 41), "layout": layout, "patch_size": 4, "sizes": sizes, "mean": MEAN, "std": STD}


def _nobody(fill: InputMaker) -> Arguments:
    return {"images": fill.normal(0, 3, 8, 8), "layout": fill.layout(torch.zeros(0, 1, dtype=torch.int64)), "patch_size": 4}


SIZES = [[8, 21], [13, 8], [0, 12], [3, 40], [29, 29]]
CASES = (
    _equal("equal sizes", (2, 3, 16, 32), 8),
    _equal("a rest", (2, 2, 11, 17), 5),
    _equal("patches of one pixel", (1, 3, 4, 6), 1),
    _equal("patches larger than the image", (2, 3, 4, 6), 8),
    _equal("normalized", (2, 3, 8, 8), 4, mean=MEAN, std=STD),
    _native("native sizes", SIZES, 4),
    _native("native sizes, normalized", SIZES, 4, mean=MEAN, std=STD),
    _native("bytes", SIZES, 4, is_byte=True),
    _native("bytes, normalized", SIZES, 7, is_byte=True, mean=MEAN, std=STD),
    Case("taken, normalized", _taken),
    Case("no image", _nobody),
)


SPECS = (
    OpSpec(
        name="patchify",
        functional=functional.patchify,
        reference=reference.patchify,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        benchmarks=benchmarks.patchify(),
        peers=benchmarks.PEERS,
        cost=benchmarks.cost,
    ),
)
