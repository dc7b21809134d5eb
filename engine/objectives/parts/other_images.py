"""The same captions beside other images: what a model that does not look at the image cannot tell apart."""

from __future__ import annotations

import dataclasses

import torch
import vlkernels as vk
from torch import Tensor

from engine.batch import IMAGE, TEXT, Batch, Patches, Pixels, Regions


def other_images(labels: Tensor) -> Tensor | None:
    """For each pair another one whose image has another label, every one taken once; None where there is no such
    order, because more than half of the images are the same."""
    largest = int(labels.unique(return_counts=True)[1].max())
    if 2 * largest > len(labels):
        return None
    order = labels.argsort()  # equal labels lie together, so a shift by the largest group leaves every group
    others = torch.empty_like(order)
    others[order] = order.roll(-largest)
    return others


def with_images(batch: Batch, index: Tensor) -> Batch:
    """Caption `i`, its corruption too, beside the image of pair `index[i]`."""
    lengths = torch.stack((batch.layout.lengths[:, TEXT], batch.layout.lengths[index, IMAGE]), dim=1).cpu()
    rows = batch.image_layout.take_positions(index)[: int(lengths[:, IMAGE].sum())].long()
    layout = vk.SegmentLayout(lengths, sample_ids=batch.layout.sample_ids.cpu()).to(index.device)
    return dataclasses.replace(batch, layout=layout, image=_taken(batch.image, index, rows))


def _taken(image: Patches | Regions | Pixels, pictures: Tensor, rows: Tensor) -> Patches | Regions | Pixels:
    """These pictures, of which the rows are the tokens."""
    if isinstance(image, Pixels):
        return Pixels(image.values[pictures], image.positions[rows])
    return type(image)(**{name: values[rows] for name, values in vars(image).items()})
