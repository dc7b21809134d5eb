"""What the data layer makes and models and objectives read: one micro-batch of image-text pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import vlkernels as vk

TEXT, IMAGE = 0, 1
"""The segments of a pair, in the order of `Batch.layout`."""

Moved = TypeVar("Moved", bound="OnDevice")


class OnDevice:
    """Dataclasses of tensors that travel to a device together."""

    def to(self: Moved, device: torch.device | str, non_blocking: bool = False) -> Moved:
        return self._moved("to", device, non_blocking=non_blocking)

    def pin_memory(self: Moved) -> Moved:
        return self._moved("pin_memory")

    def _moved(self: Moved, move: str, *where: Any, **how: Any) -> Moved:
        moved = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (Tensor, vk.SegmentLayout, OnDevice)):
                moved[item.name] = getattr(value, move)(*where, **how)
        return dataclasses.replace(self, **moved)


@dataclass
class Patches(OnDevice):
    """The images as patches, in packed order."""

    values: Tensor
    """float32 [N, 3 * patch * patch], normalised; (channel, row, column) order, as a Conv2d's weight has it."""
    positions: Tensor
    """int32 [N, 2]: row and column in the picture's grid of patches."""


@dataclass
class Regions(OnDevice):
    """The images as a detector's regions, in packed order."""

    features: Tensor
    """float32 [N, F]."""
    boxes: Tensor
    """float32 [N, 7]: x1, y1, x2, y2, w, h as shares of the picture's sides, and w * h."""


@dataclass
class Places(OnDevice):
    """Some tokens, wherever their segment lies: the same in a tower's own stream and in a joint one."""

    samples: Tensor
    """int64 [M]: sample of the batch, ascending."""
    offsets: Tensor
    """int64 [M]: position within the segment."""

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, layout: vk.SegmentLayout, segment: int = 0) -> Tensor:
        """int64 [M]: their rows in a stream where they are in segment `segment`."""
        return layout.starts[self.samples, segment] + self.offsets


@dataclass
class MaskedWords(OnDevice):
    """The captions after masked-language corruption."""

    ids: Tensor
    """int64 [T], as `Batch.text_ids`."""
    places: Places
    """The selected tokens of the text segment."""
    targets: Tensor
    """int64 [M]: the ids that stood there."""


@dataclass
class MaskedRegions(OnDevice):
    """Regions that the model must not see; `Batch.image` still has them, as targets."""

    places: Places
    """The masked tokens of the image segment."""
    soft_labels: Tensor | None
    """float32 [M, C]: the detector's distribution over its classes, where the task needs it."""


@dataclass
class Batch(OnDevice):
    """B image-text pairs of one micro-step of one rank.

    The layout carries `sample_ids`, so what `vk.Rng` draws for a pair does not depend on ranks and accumulation.
    """

    layout: vk.SegmentLayout
    """Lengths [B, 2]: tokens of each caption; patches or regions of each image."""
    text_ids: Tensor
    """int64 [T], packed: [CLS] caption [SEP]."""
    image: Patches | Regions
    """What the images are to the model."""
    labels: Tensor
    """int64 [B]: equal for equal images."""
    sample_ids: Tensor
    """int32 [B]: place in the optimizer step's global batch."""
    masked_words: MaskedWords | None = None
    masked_regions: MaskedRegions | None = None
    own_image: Tensor | None = None
    """int64 [B]: 1 where the image is the caption's own, 0 where it was replaced."""
    task: tuple[str, ...] | None = None
    """Names of the objectives this batch is for (None: all of the run)."""
    counts: dict[str, int] = field(default_factory=dict)
    """What losses are averaged over: "pairs", "masked_words", "masked_regions"."""
    normalizers: dict[str, Tensor] = field(default_factory=dict)
    """Factor on each local sum, by the name of its count; filled by the trainer."""
    faults: list[str] = field(default_factory=list)
    """Name and reason of every broken record met while the batch was made."""

    @property
    def text_layout(self) -> vk.SegmentLayout:
        """The captions as a stream of their own: lengths [B, 1]."""
        return self.layout.select((TEXT,))

    @property
    def image_layout(self) -> vk.SegmentLayout:
        """The images as a stream of their own: lengths [B, 1]."""
        return self.layout.select((IMAGE,))
