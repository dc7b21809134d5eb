"""What the Triton kernels of the linear cross-entropy run with: a pure function of dtype, widths and architecture."""

from __future__ import annotations

import torch

from vlkernels.core import similarity
from vlkernels.core.similarity import TileSizes


def tile_sizes(dtype: torch.dtype, width: int, is_taught: bool, architecture: int) -> TileSizes:
    """A tile of logits; beside one of a teacher's it is half as wide, since both lie in registers at once."""
    sizes = similarity.tile_sizes(dtype, width, architecture)
    return sizes._replace(columns=sizes.columns // 2) if is_taught else sizes
