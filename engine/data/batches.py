"""Samples put together into a batch, packed."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

import vlkernels as vk
from engine.batch import Batch, MaskedRegions, MaskedWords, Patches, Places, Regions
from engine.data.samples import Sample


def collate(
    samples: list[Sample], sample_ids: Iterable[int], faults: Iterable[str] = (), task: str | None = None
) -> Batch:
    """The samples, all made for the same objectives, one behind the other."""
    ids = torch.as_tensor(list(sample_ids), dtype=torch.int32)
    images = [_columns(sample.image) for sample in samples]
    lengths = [[len(sample.text_ids), len(image[0])] for sample, image in zip(samples, images, strict=True)]
    first = samples[0]
    batch = Batch(
        layout=vk.SegmentLayout(lengths, sample_ids=ids),
        text_ids=_joined(sample.text_ids for sample in samples),
        image=type(first.image)(*map(torch.cat, zip(*images, strict=True))),
        labels=torch.tensor([sample.identity for sample in samples], dtype=torch.int64),
        sample_ids=ids,
        task=None if task is None else (task,),
        counts={"pairs": len(samples)},
        faults=list(faults),
    )
    if first.masked_ids is not None:
        batch.masked_words = _masked_words(samples)
        batch.counts["masked_words"] = len(batch.masked_words.places)
    if first.masked_regions is not None:
        batch.masked_regions = _masked_regions(samples)
        batch.counts["masked_regions"] = len(batch.masked_regions.places)
    if first.own_image is not None:
        batch.own_image = torch.tensor([sample.own_image for sample in samples], dtype=torch.int64)
    return batch


def _columns(image: Patches | Regions) -> tuple[Tensor, Tensor]:
    """Its tensors of one row per token."""
    first, second = vars(image).values()
    return first, second


def _masked_words(samples: list[Sample]) -> MaskedWords:
    return MaskedWords(
        ids=_joined(sample.masked_ids for sample in samples),
        places=_places([sample.masked_positions for sample in samples]),
        targets=_joined(sample.text_ids[sample.masked_positions] for sample in samples),
    )


def _masked_regions(samples: list[Sample]) -> MaskedRegions:
    known = samples[0].soft_labels is not None
    return MaskedRegions(
        places=_places([sample.masked_regions for sample in samples]),
        soft_labels=_joined(sample.soft_labels for sample in samples) if known else None,
    )


def _places(offsets: list[np.ndarray]) -> Places:
    samples = np.repeat(np.arange(len(offsets)), [len(some) for some in offsets])
    return Places(torch.from_numpy(samples), _joined(offsets))


def _joined(arrays: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays)))
