"""impl "triton" on the host: what the kernel is launched with, for one wave of the pairs of two blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core import similarity
from vlkernels.core.exchange import Block
from vlkernels.core.similarity import TileSizes, Wave
from vlkernels.core.triton_runtime import Launch, family


class Logits(NamedTuple):
    """What makes logits of similarities, and the labels of all ranks that say who belongs together, if there are any."""

    scale: Tensor
    bias: Tensor
    labels: Tensor | None


def pairs_launch(
    logits: Logits, images: Block, texts: Block, wave: Wave, sums: Tensor, gradient: bool, architecture: int
) -> Launch:
    """``sums``: float32 [3, programs of the wave]."""
    sizes = tile_sizes(images, architecture)
    labels = (None, None) if logits.labels is None else (logits.labels[images.span], logits.labels[texts.span])
    arguments = (
        images.features, texts.features, *labels, logits.scale, logits.bias, wave.weights, sums,
        wave.rows.start, wave.columns.start, wave.rows.stop, wave.columns.stop, images.start - texts.start,
        images.features.stride(0), texts.features.stride(0), wave.weights.stride(0), similarity.FACTOR[images.features.dtype],
    )  # fmt: skip
    constants = {
        "ROWS": sizes.rows,
        "COLUMNS": sizes.columns,
        "DEPTH": sizes.depth,
        "WIDTH": images.features.shape[1],
        "GRADIENT": gradient,
    }
    return Launch(_kernels().pairs_kernel, (wave.programs(sizes),), arguments, constants, sizes.warps, sizes.stages)


def tile_sizes(images: Block, architecture: int) -> TileSizes:
    """What the kernel works in; on sm_100 quarters of a tile of 64 rows would be spread over all threads."""
    sizes = similarity.tile_sizes(images.features.dtype, images.features.shape[1], architecture)
    half = images.features.dtype != torch.float32
    return TileSizes(128, 128, sizes.depth, 8, 3) if half and family(architecture) == 100 else sizes


def _kernels() -> Any:
    from vlkernels.ops.sigmoid_loss.gpu import kernels

    return kernels
