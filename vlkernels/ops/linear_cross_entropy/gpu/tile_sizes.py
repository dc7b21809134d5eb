"""What the Triton kernels of the linear cross-entropy run with: a pure function of dtype, widths and architecture."""

from __future__ import annotations

import torch

from vlkernels.core import similarity
from vlkernels.core.similarity import TileSizes
from vlkernels.core.triton_runtime import family


def tile_sizes(dtype: torch.dtype, width: int, is_taught: bool, architecture: int) -> TileSizes:
    """A tile of logits; beside one of a teacher's it is half as wide, since both lie in registers at once."""
    sizes = similarity.tile_sizes(dtype, width, architecture)
    if is_taught:
        sizes = sizes._replace(columns=sizes.columns // 2)
    if family(architecture) == 100:  # four warps would spill what they know of their rows
        sizes = sizes._replace(warps=8)
    return sizes
