"""Other people's ways to cut images into patches, which find the patches that are not padding in every call."""

from __future__ import annotations

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout


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
