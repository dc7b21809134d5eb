"""Patchify by definition: cut every image of the batch, then index the patches that the layout asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout


def patchify(
    images: Tensor,
    layout: SegmentLayout,
    patch_size: int,
    *,
    sizes: Tensor | None = None,
    segment: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    batch, channels, height, width = images.shape
    rows, columns, p = height // patch_size, width // patch_size, patch_size
    out_dtype = output_dtype(images, dtype)
    pixels = normalized(images, mean, std, out_dtype)[:, :, : rows * p, : columns * p]
    cut = pixels.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
    patches = cut.to(out_dtype, memory_format=torch.contiguous_format, copy=True)
    patches = patches.view(batch * rows * columns, channels * p * p)

    packed = layout.select((segment,))
    if sizes is None and packed.num_tokens == len(patches):
        return patches
    sample, position = packed.token_sample(), packed.token_position()
    own_columns = torch.full_like(sample, max(columns, 1))
    if sizes is not None and batch:
        own_columns = (sizes[:, 1] // p).clamp(min=1)[sample.clamp(min=0).long()]
    source = (sample * rows + position // own_columns) * columns + position % own_columns
    source = torch.where(sample < 0, len(patches), source).long()
    return torch.cat((patches, patches.new_zeros(1, patches.shape[1])))[source]


def normalized(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, out_dtype: torch.dtype) -> Tensor:
    """In float32 at least: bytes over 255, then without the mean, over the standard deviation, of each channel."""
    if images.dtype == out_dtype and mean is None:
        return images
    pixels = images.to(torch.promote_types(out_dtype, torch.float32))
    if images.dtype == torch.uint8:
        pixels = pixels / 255
    if mean is None or std is None:
        return pixels
    channel_mean, channel_std = (pixels.new_tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
    return (pixels - channel_mean) / channel_std


def output_dtype(images: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return images.dtype if images.dtype.is_floating_point else torch.float32
