"""The tiles each kernel works in: one pure function of dtype, D and architecture; lengths choose how samples share a tile."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TileSizes(NamedTuple):
    """Rows and columns of a tile, elements of D that are read at once, warps of a program, stages of its pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By the bytes of a token's element. Taken from compiles for absent cards: the largest tiles that spill nothing on sm_90.
MAXIMA = {2: TileSizes(128, 128, 64, 16, 3), 4: TileSizes(64, 64, 32, 8, 2)}
MAXIMA_OF_SM_100 = TileSizes(64, 128, 64, 8, 3)  # its tensor cores serve four or eight warps
GRADIENTS = {2: TileSizes(64, 64, 256, 8, 2), 4: TileSizes(32, 32, 64, 8, 2)}


def tile_sizes(kernel: str, dtype: torch.dtype, width: int, architecture: int) -> TileSizes:
    """What ``kernel`` runs with on ``architecture`` (90 is sm_90)."""
    table = GRADIENTS if kernel == "gradient" else MAXIMA
    sizes = table[dtype.itemsize]
    if kernel == "maxima" and architecture // 10 == 10 and dtype.itemsize == 2:
        sizes = MAXIMA_OF_SM_100
    return sizes._replace(depth=min(sizes.depth, max(16, power_of_two(width))))


def slot(longest: int, size: int) -> tuple[int, int]:
    """Rows of a tile of ``size`` for each sample, and samples of a tile."""
    rows = min(power_of_two(longest), size)
    return rows, size // rows


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (number - 1).bit_length()
