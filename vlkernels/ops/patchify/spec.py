"""Patchify's cases, benchmarks and peers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.spec import Arguments, Case, Cost, InputMaker, OpSpec
from vlkernels.ops.patchify import functional, reference

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
BATCH, SIDE, PATCH = 32, 224, 16


def _patches(sizes: Sequence[Sequence[int]], patch_size: int) -> list[int]:
    return [(height // patch_size) * (width // patch_size) for height, width in sizes]


def _equal(name: str, shape: Sequence[int], patch_size: int, **options: Any) -> Case:
    """Images that fill their tensor, alone in their layout."""

    def make(fill: InputMaker) -> Arguments:
        batch, _, height, width = shape
        layout = fill.layout([[n] for n in _patches([(height, width)] * batch, patch_size)])
        return {"images": fill.normal(*shape), "layout": layout, "patch_size": patch_size, **options}

    return Case(name, make)


def _native(name: str, sizes: Sequence[Sequence[int]], patch_size: int, is_byte: bool = False, **options: Any) -> Case:
    """Images of their own sizes, one of two segments beside text."""

    def make(fill: InputMaker) -> Arguments:
        height, width = (max(side) + 3 for side in zip(*sizes))
        layout = fill.layout([[b, n] for b, n in enumerate(_patches(sizes, patch_size))], capacity=99)
        shape = (len(sizes), 3, height, width)
        images = fill.integers(0, 256, shape).to(torch.uint8) if is_byte else fill.normal(*shape)
        chosen = {"dtype": fill.dtype} if is_byte else {}
        at = torch.tensor(sizes, device=fill.device)
        return {"images": images, "layout": layout, "patch_size": patch_size, "sizes": at, "segment": 1, **chosen, **options}

    return Case(name, make)


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
    Case("no image", _nobody),
)


def _bench_equal(fill: InputMaker) -> Arguments:
    layout = fill.layout([[(SIDE // PATCH) ** 2]] * BATCH)
    return {"images": fill.normal(BATCH, 3, SIDE, SIDE), "layout": layout, "patch_size": PATCH}


def _bench_native(fill: InputMaker) -> Arguments:
    """Sides between half the longest and the longest."""
    sizes = fill.integers(SIDE // 2, SIDE + 1, (BATCH, 2))
    layout = fill.layout([[n] for n in _patches(sizes.tolist(), PATCH)])
    return {"images": fill.normal(BATCH, 3, SIDE, SIDE), "layout": layout, "patch_size": PATCH, "sizes": sizes}


def _valid(layout: SegmentLayout, columns: int, rows: int, patch_size: int, sizes: Tensor | None) -> Tensor:
    """int64: the patches of padded images that are somebody's, as other code finds them."""
    if sizes is None:
        return torch.arange(layout.num_tokens, device=layout.device)
    down, along = (sizes // patch_size).unbind(1)
    y, x = torch.arange(rows, device=sizes.device), torch.arange(columns, device=sizes.device)
    valid = (y < down[:, None])[:, :, None] & (x < along[:, None])[:, None, :]
    return valid.flatten().nonzero().flatten()


def patchify_by_permute(images: Tensor, layout: SegmentLayout, patch_size: int, sizes: Tensor | None = None) -> Tensor:
    """As einops' rearrange does, then the rows that are not padding."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    patches = cut.reshape(batch * rows * columns, -1)
    return patches if sizes is None else patches.index_select(0, _valid(layout, columns, rows, patch_size, sizes))


def patchify_by_unfold(images: Tensor, layout: SegmentLayout, patch_size: int, sizes: Tensor | None = None) -> Tensor:
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    patches = torch.nn.functional.unfold(images, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
    return patches if sizes is None else patches.index_select(0, _valid(layout, columns, rows, patch_size, sizes))


def _cost(images: Tensor, layout: SegmentLayout, patch_size: int, sizes: Tensor | None = None) -> Cost:
    """Every pixel of a patch is read and written once; the backward also writes the other pixels' zeros."""
    moved = layout.num_tokens * images.shape[1] * patch_size**2 * images.element_size()
    return Cost(forward_bytes=2 * moved, backward_bytes=moved + images.numel() * images.element_size())


SPECS = (
    OpSpec(
        name="patchify",
        functional=functional.patchify,
        reference=reference.patchify,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        benchmarks={"equal sizes": _bench_equal, "native sizes": _bench_native},
        peers={"reshape + permute": patchify_by_permute, "unfold": patchify_by_unfold},
        cost=_cost,
    ),
)
