"""What the data layer makes and models and objectives read: one micro-batch of image-text pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vlkernels as vk


@dataclass
class Batch:
    """B image-text pairs of one micro-step of one rank.

    Patches are flattened in (channel, row, column) order, as the weight [D, 3, p, p] of a Conv2d is.
    Layouts carry `sample_ids`, so what `vk.Rng` draws for a pair does not depend on ranks and accumulation.
    """

    patches: Tensor
    """float32 [B, P, 3 * patch * patch], normalised, zero padded."""
    patch_positions: Tensor
    """int32 [B, P, 2]: row and column in the picture's grid of patches."""
    image_layout: vk.SegmentLayout
    """Lengths [B, 1]: patches of each picture."""
    text_ids: Tensor
    """int64 [B, L]: [CLS] caption [SEP], zero padded."""
    masked_ids: Tensor
    """int64 [B, L]: the same after masked-language corruption."""
    text_layout: vk.SegmentLayout
    """Lengths [B, 1]: tokens of each caption."""
    mlm_rows: Tensor
    """int64 [M]: the selected rows of the packed text stream."""
    mlm_targets: Tensor
    """int64 [M]: the ids that stood there."""
    labels: Tensor
    """int64 [B]: equal for equal images."""
    sample_ids: Tensor
    """int32 [B]: place in the optimizer step's global batch."""
    counts: dict[str, int]
    """What losses are averaged over: "pairs" and "mlm_tokens" of this batch."""
    normalizers: dict[str, Tensor] = field(default_factory=dict)
    """Factor on each local sum, by the name of its count; filled by the trainer."""
    faults: list[str] = field(default_factory=list)
    """Name and reason of every broken record met while the batch was made."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._moved(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._moved(lambda value: value.pin_memory())

    def _moved(self, move: Callable[[Any], Any]) -> Batch:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        moved = {
            name: move(value)
            for name, value in values.items()
            if isinstance(value, (Tensor, vk.SegmentLayout))
        }
        return dataclasses.replace(self, **moved)
