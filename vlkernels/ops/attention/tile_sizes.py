"""The tiles each kernel works in: one pure function of dtype, head_dim, flags and architecture; lengths have no say."""

from __future__ import annotations

from typing import NamedTuple

import torch

KERNELS = ("forward", "query_gradient", "key_gradient")
MOST_HEAD_DIM = 256


class TileSizes(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a head is padded to in registers."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_sizes(kernel: str, dtype: torch.dtype, head_dim: int, dropout: bool, architecture: int) -> TileSizes:
    """What ``kernel`` runs with on ``architecture`` (90 is sm_90)."""
    width = padded_head_dim(head_dim)
    return TileSizes(128, 64, 4, 3) if kernel == "forward" else TileSizes(128, 64, 8, 2) if kernel == "query_gradient" else TileSizes(64, 128, 8, 2)
