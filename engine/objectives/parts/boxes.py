"""Boxes as shares of a picture's sides: x and y of the middle, width, height."""

from __future__ import annotations

import torch
from torch import Tensor


def corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Left and upper edge, right and lower edge: `[..., 2]` of `[..., 4]`."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return middle - half, middle + half


def distance(boxes: Tensor, others: Tensor) -> Tensor:
    """`[...]`: sum of the four absolute differences."""
    return (boxes - others).abs().sum(-1)


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """`[...]`: the area that two boxes share, of that which they cover; of two boxes of no area 0."""
    shared, covered = _areas(boxes, others)
    return _share(shared, covered)


def generalised_overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """`[...]`: the same, less the share of the smallest box around both that neither covers: from -1, of boxes far apart, to 1
    (Rezatofighi et al., 2019)."""
    shared, covered = _areas(boxes, others)
    (left, right), (low, high) = corners(boxes), corners(others)
    around = (torch.maximum(right, high) - torch.minimum(left, low)).prod(-1)
    return _share(shared, covered) - _share(around - covered, around)


def _areas(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """What both have, and what either has."""
    (left, right), (low, high) = corners(boxes), corners(others)
    shared = (torch.minimum(right, high) - torch.maximum(left, low)).clamp(min=0).prod(-1)
    return shared, boxes[..., 2:].prod(-1) + others[..., 2:].prod(-1) - shared


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp(min=torch.finfo(whole.dtype).tiny)
