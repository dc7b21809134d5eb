"""What the data layer makes and models and objectives read: samples, and the micro-batch they are put together to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import vlkernels as vk

TEXT, IMAGE = 0, 1
"""The segments of a sample, in the order of `Batch.layout`."""

Moved = TypeVar("Moved", bound="OnDevice")


class OnDevice:
    """Dataclasses of tensors that travel to a device together."""

    def to(self: Moved, device: torch.device | str, non_blocking: bool = False) -> Moved:
        return self._moved("to", device, non_blocking=non_blocking)

    def pin_memory(self: Moved) -> Moved:
        return self._moved("pin_memory")

    def _moved(self: Moved, move: str, *where: Any, **how: Any) -> Moved:
        def moved(value: Any) -> Any:
            if isinstance(value, (Tensor, vk.SegmentLayout, OnDevice)):
                return getattr(value, move)(*where, **how)
            return {name: moved(item) for name, item in value.items()} if isinstance(value, dict) else value

        return dataclasses.replace(self, **{item.name: moved(getattr(self, item.name)) for item in dataclasses.fields(self)})


@dataclass
class Patches(OnDevice):
    """The images as patches, in packed order."""

    values: Tensor
    """float32 [N, 3 * patch * patch], normalised; (channel, row, column) order, as a Conv2d's weight has it."""
    positions: Tensor
    """int32 [N, 2]: row and column in the picture's grid of patches."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass
class Regions(OnDevice):
    """The images as a detector's regions, in packed order."""

    features: Tensor
    """float32 [N, F]."""
    boxes: Tensor
    """float32 [N, 7]: x1, y1, x2, y2, w, h as shares of the picture's sides, and w * h."""

    def __len__(self) -> int:
        return len(self.features)


@dataclass
class Pixels(OnDevice):
    """The images as they are, for a convolutional backbone: each becomes the cells of a grid."""

    values: Tensor
    """float32 [B, 3, H, W], normalised."""
    positions: Tensor
    """int32 [N, 2]: row and column of every cell, in packed order."""

    def __len__(self) -> int:
        return len(self.positions)


@dataclass
class Places(OnDevice):
    """Some tokens, wherever their segment lies: the same in a tower's own stream and in a joint one."""

    samples: Tensor
    """int64 [M]: sample of the batch, ascending."""
    offsets: Tensor
    """int64 [M]: position within the segment."""

    @classmethod
    def of_sample(cls, offsets: np.ndarray) -> Places:
        """Those of a sample that is not in a batch yet."""
        return cls(torch.zeros(len(offsets), dtype=torch.int64), torch.from_numpy(offsets))

    @classmethod
    def of_samples(cls, parts: Sequence[Places]) -> Places:
        """Those of one sample after another."""
        counts = torch.tensor([len(part) for part in parts])
        return cls(torch.repeat_interleave(counts), torch.cat([part.offsets for part in parts]))

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, layout: vk.SegmentLayout, segment: int = 0) -> Tensor:
        """int64 [M]: their rows in a stream where they are in segment `segment`."""
        return layout.starts[self.samples, segment] + self.offsets


@dataclass
class Text(OnDevice):
    """Packed texts: [CLS] text [SEP], or as an objective has made them."""

    ids: Tensor
    """int64 [T]."""
    layout: vk.SegmentLayout
    """Lengths [B, 1]."""
    types: Tensor | None = None
    """int64 [T]: which sentence of a pair a token is of."""
    boxes: Tensor | None = None
    """int32 [T, 4]: x0, y0, x1, y1 of the word in thousandths of the page's sides."""


@dataclass
class MaskedWords(OnDevice):
    """The texts after corruption, as long as before."""

    ids: Tensor
    """int64 [T], as `Text.ids`."""
    places: Places
    """The selected tokens of the text segment."""
    targets: Tensor
    """int64 [M]: the ids that stood there."""

    def __len__(self) -> int:
        return len(self.places)


@dataclass
class MaskedRegions(OnDevice):
    """Regions that are to be told; `Batch.image` still has them, as targets."""

    places: Places
    """The masked tokens of the image segment."""
    soft_labels: Tensor | None = None
    """float32 [M, C]: the detector's distribution over its classes, where the objective needs it."""
    hidden: Places | None = None
    """Those of them that the model does not see (None: it sees none)."""

    def __len__(self) -> int:
        return len(self.places)


@dataclass
class HiddenCodes(OnDevice):
    """Visual codes that the model must not see: in each picture all cells that have the code of one of them."""

    places: Places
    """That cell, one of each picture."""

    def __len__(self) -> int:
        return len(self.places)


@dataclass
class Objects(OnDevice):
    """What is to be seen in the pictures, and where, in packed order."""

    layout: vk.SegmentLayout
    """Lengths [B, 1]: how many each picture shows."""
    boxes: Tensor
    """float32 [M, 4]: x and y of the middle, width and height, as shares of the picture's sides."""
    classes: Tensor
    """int64 [M]."""
    attributes: Tensor
    """int64 [M]; -1: not known."""

    def __len__(self) -> int:
        return len(self.classes)


@dataclass
class Words:
    """The text of one sample, as objectives prepare it and `collate` makes `Text` of it."""

    ids: np.ndarray
    """int64 [T]."""
    words: np.ndarray
    """int64 [T]: the word that each token is of; special tokens -1."""
    types: np.ndarray | None = None
    """int64 [T], of a pair of segments: which one a token is of."""
    boxes: np.ndarray | None = None
    """int32 [T, 4], of a page: left, top, right, bottom of the token's word in thousandths of the sides."""
    lines: np.ndarray | None = None
    """int64 [T], of a page: the line that each token is in; special tokens -1."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Sample:
    """One example: a text, a picture or both, and what objectives have added to them."""

    text: Words | None
    image: Patches | Regions | Pixels | None
    identity: int
    """Equal for equal pictures."""
    pair: int | None = None
    """Of a text of two segments: 0 where they are as in their document, 1 where they are not."""
    classes: tuple[int, ...] = ()
    """What the picture or the page shows, by number."""
    soft_labels: np.ndarray | None = None
    """float32 [regions, C]: the detector's distributions, where an objective needs them."""
    objects: Objects | None = None
    """What the picture shows and where, where an objective needs it."""
    own_image: bool | None = None
    """Whether the picture is the text's own, where others may take its place."""
    views: dict[str, Any] = field(default_factory=dict)
    """By name, what objectives have prepared of it: `Words` of its own length, a dataclass on device as a batch of one
    has it, rows of an array, or a number."""


@dataclass
class Batch(OnDevice):
    """B samples of one micro-step of one rank: texts, images, or pairs of them.

    The layout carries `sample_ids`, so what `vk.Rng` draws for a sample does not depend on ranks and accumulation.
    """

    layout: vk.SegmentLayout
    """Lengths [B, 2]: tokens of each text; patches, regions or cells of each image. Either may be 0, for some or for all."""
    text: Text | None
    image: Patches | Regions | Pixels | None
    """What the images are to the model."""
    labels: Tensor
    """int64 [B]: equal for equal images."""
    sample_ids: Tensor
    """int32 [B]: place in the optimizer step's global batch."""
    views: dict[str, OnDevice | Tensor] = field(default_factory=dict)
    """What objectives have prepared, by their names."""
    task: tuple[str, ...] | None = None
    """Names of the objectives this batch is for (None: all of the run)."""
    counts: dict[str, int] = field(default_factory=dict)
    """What losses are averaged over: "pairs", which are all samples, and by the name of its view what an objective
    predicts."""
    normalizers: dict[str, Tensor] = field(default_factory=dict)
    """Factor on each local sum, by the name of its count; filled by the trainer."""
    progress: float = 1.0
    """Share of the run's steps that lie behind; filled by the trainer. What rises over a run has risen where none does."""
    faults: list[str] = field(default_factory=list)
    """Name and reason of every broken record met while the batch was made."""

    @property
    def image_layout(self) -> vk.SegmentLayout:
        """The images as a stream of their own: lengths [B, 1]."""
        return self.layout.select((IMAGE,))


def put_together(parts: Sequence[Any], sample_ids: Tensor) -> Any:
    """What each sample has, as their batch has it; it follows from the type."""
    first = parts[0] if parts else None
    if first is None:
        return None
    if isinstance(first, Words):
        return _texts(parts, sample_ids)
    if isinstance(first, Places):
        return Places.of_samples(parts)
    if isinstance(first, vk.SegmentLayout):
        return vk.SegmentLayout(torch.cat([part.lengths for part in parts]), sample_ids=sample_ids)
    if isinstance(first, OnDevice):
        columns = {item.name: [getattr(part, item.name) for part in parts] for item in dataclasses.fields(first)}
        return type(first)(**{name: put_together(column, sample_ids) for name, column in columns.items()})
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    return torch.from_numpy(np.concatenate(parts)) if isinstance(first, np.ndarray) else torch.tensor(parts)


def _texts(parts: Sequence[Words], sample_ids: Tensor) -> Text:
    layout = vk.SegmentLayout([[len(part)] for part in parts], sample_ids=sample_ids)
    ids, types, boxes = (
        put_together([getattr(part, name) for part in parts], sample_ids) for name in ("ids", "types", "boxes")
    )
    return Text(ids, layout, types, boxes)
