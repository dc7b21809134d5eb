"""The same texts beside other images, or laid out as other pages: what a model that does not look there cannot tell apart."""

from __future__ import annotations

import dataclasses

import torch
import vlkernels as vk
from torch import Tensor

from engine.batch import IMAGE, TEXT, Batch, Patches, Pixels, Regions, Text


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


def with_pages(batch: Batch, index: Tensor) -> Batch:
    """Text `i`, its corruption too, on page `index[i]`: its words stand where that page's do, beside its picture, if any."""
    batch = dataclasses.replace(batch, text=dataclasses.replace(batch.text, boxes=boxes_of_others(batch.text, index)))
    return batch if batch.image is None else with_images(batch, index)


def boxes_of_others(text: Text, index: Tensor) -> Tensor:
    """int32 `[T, 4]`: of the other text's words in their order, from the beginning again behind the last; ends keep to ends."""
    lengths, sample, place = text.layout.lengths[:, 0].long(), text.layout.token_sample(), text.layout.token_position().long()
    other = index[sample]
    last, words = lengths[other] - 1, (lengths[other] - 2).clamp_min(1)
    taken = torch.where(place == lengths[sample] - 1, last, 1 + (place - 1) % words)
    firsts = lengths.cumsum(0) - lengths
    return text.boxes[firsts[other] + torch.where(place == 0, 0, taken).minimum(last)]


def _taken(image: Patches | Regions | Pixels, pictures: Tensor, rows: Tensor) -> Patches | Regions | Pixels:
    """These pictures, of which the rows are the tokens."""
    if isinstance(image, Pixels):
        return Pixels(image.values[pictures], image.positions[rows])
    return type(image)(**{name: values[rows] for name, values in vars(image).items()})
