"""The tiles each kernel works in: one pure function of dtype, head_dim, dropout and architecture; lengths have no say.

Taken from compiles for absent cards (`make static`, MATH.md): the largest tiles that spill nothing on sm_90.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vlkernels.core.triton_runtime import family

KERNELS = ("forward", "query_gradient", "key_gradient")
BIAS_KERNELS = (*KERNELS, "shared_gradient", "distance_gradient")
MOST_HEAD_DIM = 256


class TileSizes(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# By the width a head is padded to (64: up to 64), for forward, query_gradient, key_gradient.
HALF = {
    64: (TileSizes(128, 64, 8, 3), TileSizes(128, 64, 8, 2), TileSizes(64, 128, 8, 2)),
    128: (TileSizes(128, 64, 8, 2), TileSizes(128, 64, 8, 2), TileSizes(64, 64, 8, 2)),
    256: (TileSizes(64, 64, 8, 2), TileSizes(64, 32, 8, 2), TileSizes(32, 32, 8, 2)),
}
# Products in float32 without tensor cores keep both factors in registers.
SINGLE = {
    64: TileSizes(32, 32, 4, 2),
    128: TileSizes(32, 32, 8, 2),
    256: TileSizes(16, 16, 8, 2),
}
# (kernel, width, dropout, family of the architecture), where the tables above would spill or not fit; narrower heads may have
# an entry of their own.
EXCEPTIONS = {
    ("key_gradient", 128, False, 90): TileSizes(32, 128, 8, 2),
    ("key_gradient", 128, True, 90): TileSizes(32, 128, 8, 2),
    ("key_gradient", 128, True, 80): TileSizes(32, 64, 8, 2),
    ("key_gradient", 128, True, 86): TileSizes(32, 64, 8, 2),
    ("key_gradient", 128, True, 100): TileSizes(32, 64, 8, 2),
    ("key_gradient", 64, True, 100): TileSizes(64, 64, 8, 2),
    ("query_gradient", 32, False, 100): TileSizes(128, 32, 8, 2),
    ("query_gradient", 32, True, 100): TileSizes(128, 32, 8, 2),
    ("forward", 128, False, 100): TileSizes(128, 32, 8, 3),
    ("forward", 256, False, 100): TileSizes(64, 32, 8, 2),
    ("query_gradient", 256, False, 100): TileSizes(32, 32, 8, 2),
    ("forward", 256, True, 100): TileSizes(32, 32, 8, 2),
    ("query_gradient", 256, True, 100): TileSizes(32, 32, 8, 2),
    **{(kernel, 256, dropout, 86): TileSizes(32, 32, 8, 1) for kernel in KERNELS for dropout in (False, True)},
}
# With a bias, for forward, query_gradient, key_gradient, shared_gradient, distance_gradient: its pointers take registers, and
# the values of a tile pass through shared memory. Dropout or not.
BIASED = {
    64: (
        TileSizes(128, 64, 8, 2), TileSizes(128, 32, 8, 2), TileSizes(64, 64, 8, 2), TileSizes(64, 64, 8, 2),
        TileSizes(64, 32, 8, 2),
    ),
    128: (
        TileSizes(128, 32, 8, 2), TileSizes(64, 32, 8, 2), TileSizes(16, 64, 8, 2), TileSizes(64, 64, 8, 2),
        TileSizes(64, 32, 8, 2),
    ),
    256: (TileSizes(32, 32, 8, 2),) * len(BIAS_KERNELS),
}  # fmt: skip
# (kernel, width) where several coordinates would spill.
SEVERAL_COORDINATES = {("key_gradient", 64): TileSizes(32, 64, 8, 2)}
# (kernel, width, family of the architecture), as above.
BIASED_EXCEPTIONS = {
    ("forward", 64, 100): TileSizes(128, 32, 8, 2),
    ("query_gradient", 64, 100): TileSizes(64, 64, 8, 2),
    ("forward", 128, 100): TileSizes(64, 32, 8, 2),
    ("shared_gradient", 128, 100): TileSizes(64, 32, 8, 2),
    **{(kernel, width, 86): TileSizes(32, 32, 4, 2) for kernel in BIAS_KERNELS for width in (64, 128)},
    **{(kernel, 256, 86): TileSizes(32, 32, 8, 1) for kernel in BIAS_KERNELS},
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a head is padded to in registers."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_sizes(
    kernel: str, dtype: torch.dtype, head_dim: int, dropout: bool, architecture: int, bias: int | None = None
) -> TileSizes:
    """What ``kernel`` runs with on ``architecture`` (90 is sm_90). ``bias``: its coordinates, 0 for a tensor, ``None`` without."""
    exact, card = padded_head_dim(head_dim), family(architecture)
    width = max(64, exact)
    if dtype == torch.float32:
        return SINGLE[width]
    if bias is not None:
        usual = BIASED[width][BIAS_KERNELS.index(kernel)]
        usual = SEVERAL_COORDINATES.get((kernel, width), usual) if bias > 1 else usual
        return BIASED_EXCEPTIONS.get((kernel, width, card), usual)
    usual = EXCEPTIONS.get((kernel, width, dropout, card), HALF[width][KERNELS.index(kernel)])
    return EXCEPTIONS.get((kernel, exact, dropout, card), usual)
