"""Samples put together into a batch, packed."""

from collections.abc import Iterable

import torch
from torch import Tensor

import vlkernels as vk
from engine.batch import Batch, Sample, put_together


def collate(
    samples: list[Sample], sample_ids: Iterable[int], faults: Iterable[str] = (), task: str | None = None
) -> Batch:
    """The samples, all made for the same objectives, one behind the other."""
    ids = torch.as_tensor(list(sample_ids), dtype=torch.int32)
    views = {name: put_together([sample.views[name] for sample in samples], ids) for name in samples[0].views}
    return Batch(
        layout=vk.SegmentLayout([[len(sample.text or ()), len(sample.image or ())] for sample in samples], sample_ids=ids),
        text=put_together([sample.text for sample in samples], ids),
        image=put_together([sample.image for sample in samples if sample.image is not None], ids),
        labels=torch.tensor([sample.identity for sample in samples], dtype=torch.int64),
        sample_ids=ids,
        views=views,
        task=None if task is None else (task,),
        counts={"pairs": len(samples)} | {name: len(view) for name, view in views.items() if is_counted(view)},
        faults=list(faults),
    )


def is_counted(view: object) -> bool:
    """Whether a view says itself how much of it is predicted."""
    return hasattr(view, "__len__") and not isinstance(view, Tensor)
