"""Other people's ways to cut images into patches: padded, then, where images have sizes of their own, without the padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.spec import Arguments


def permute(images: Tensor, patch_size: int, rows: Tensor | None = None) -> Tensor:
    """As einops' rearrange does it."""
    batch, channels, height, width = images.shape
    down, along = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, down, patch_size, along, patch_size).permute(0, 2, 4, 1, 3, 5)
    patches = cut.reshape(batch * down * along, -1)
    return patches if rows is None else patches.index_select(0, rows)


def unfold(images: Tensor, patch_size: int, rows: Tensor | None = None) -> Tensor:
    patches = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
    return patches if rows is None else patches.index_select(0, rows)


def with_rows(arguments: Arguments) -> Arguments:
    """The patches of padded images that are somebody's, found beforehand."""
    images, patch_size = arguments["images"], arguments["patch_size"]
    rows = valid_patches(images, patch_size, arguments["sizes"]) if "sizes" in arguments else None
    return {"images": images, "patch_size": patch_size, "rows": rows}


def valid_patches(images: Tensor, patch_size: int, sizes: Tensor) -> Tensor:
    down, along = (sizes // patch_size).unbind(1)
    y, x = (torch.arange(side // patch_size, device=sizes.device) for side in images.shape[2:])
    valid = (y < down[:, None])[:, :, None] & (x < along[:, None])[:, None, :]
    return valid.flatten().nonzero().flatten()


def permute_by_sizes(images: Tensor, layout: SegmentLayout, patch_size: int, sizes: Tensor | None = None) -> Tensor:
    """The rows found in every call, as code that is given sizes does."""
    return permute(images, patch_size, None if sizes is None else valid_patches(images, patch_size, sizes))


def unfold_by_sizes(images: Tensor, layout: SegmentLayout, patch_size: int, sizes: Tensor | None = None) -> Tensor:
    return unfold(images, patch_size, None if sizes is None else valid_patches(images, patch_size, sizes))
