"""From a record to a sample: a text, tokenized, a picture as the model reads it, and what objectives add."""

from collections.abc import Collection
from functools import partial
from hashlib import blake2b

import numpy as np
import torch

import vlkernels as vk

from engine.batch import Objects, Patches, Pixels, Regions, Sample, Words
from engine.config import Config
from engine.corruption.pages import GRID
from engine.data.pictures.transform import ImageTransform, grid_positions
from engine.data.plan.order import Purpose, generator
from engine.data.records.record import PageWords, Record, RecordFault
from engine.data.tokenization.tokenizer import Tokenizer
from engine.objectives import Objective
from engine.objectives.parts.objective import Draw


def image_transform(config: Config, train: bool = False) -> ImageTransform:
    """The transform of a run: with its random choices for training, without them for evaluation."""
    data, pictures = config.data, config.model.reads_pictures
    return ImageTransform(
        size=data.image_size,
        patch=pictures.patch_size,
        max_grid=tuple(pictures.max_grid),
        mean=data.image_mean,
        std=data.image_std,
        resize=data.resize,
        random_crop=data.random_crop if train else "none",
        random_crop_scale=data.random_crop_scale,
        flip=data.flip and train,
        augment=data.augment if train else "none",
    )


def transform_of_held_out(config: Config) -> ImageTransform | None:
    """The transform without random choices; None where a run reads no pixels."""
    pictures = config.model.reads_pictures
    return None if pictures is None or pictures.kind == "regions" else image_transform(config)


class SampleMaker:
    """Record -> Sample, for objectives that share a batch.

    Every choice depends on (seed, stream, epoch, example) and on nothing else.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, train: bool, objectives: Collection[Objective], stream: int = 0
    ) -> None:
        self.seed = config.seed if train else 0  # evaluations with different seeds stay comparable
        self.stream = stream
        self.train = train
        self.tokenizer = tokenizer
        pictures = config.model.reads_pictures
        self.as_pixels = pictures is not None and pictures.kind == "grid"
        self.transform = None if config.data.regions or pictures is None else image_transform(config, train)
        self.reads_text = config.model.reads_text
        self.no_picture = tuple(round(255 * mean) for mean in config.data.image_mean)
        """The colour of a picture that is not there: 0 to the model."""
        self.max_patches = config.data.max_patches if train else None
        self.max_tokens = config.data.max_caption_tokens
        self.fills = config.data.fill_captions
        self.objectives = sorted(objectives, key=lambda one: bool(one.beside))  # those that look at others' views last
        self.needs_soft_labels = any(objective.needs_soft_labels for objective in objectives)
        self.needs_objects = any(objective.needs_objects for objective in objectives)

    def __call__(
        self, record: Record, epoch: int, example: int, caption: int | None = None, own_image: bool | None = None
    ) -> Sample:
        """`caption`: which of the record's; None: one drawn for training, the first for evaluation."""
        labels = None if record.detections is None else record.detections.soft_labels
        text, image = self._text(record, epoch, example, caption), self._image(record, epoch, example)
        objects = objects_of(record) if self.needs_objects else None
        sample = Sample(
            text, image, record.identity, classes=record.classes, soft_labels=labels, objects=objects, own_image=own_image
        )
        return self.prepared(sample, record.key, epoch, example)

    def prepared(self, sample: Sample, key: str, epoch: int, example: int) -> Sample:
        """With what the objectives add to it."""
        for objective in self.objectives:
            draw = Draw(self.tokenizer, partial(self.random, epoch, example, purpose_of(objective.name)))
            try:
                objective.prepare(sample, draw)
            except ValueError as error:
                raise RecordFault(key, str(error)) from None
        return sample

    def random(self, epoch: int, example: int, purpose: int) -> np.random.Generator:
        return generator(self.seed, epoch, example, purpose, self.stream)

    def _text(self, record: Record, epoch: int, example: int, caption: int | None) -> Words | None:
        if not self.reads_text:
            return None
        if record.page is not None:
            return self._page_text(record.page)
        count = len(record.captions if record.token_ids is None else record.token_ids)
        if caption is None:
            draws = self.train and count > 1
            caption = self.random(epoch, example, Purpose.CAPTION).integers(count) if draws else 0
        try:
            return Words(*self.caption(record, caption))
        except ValueError as error:
            raise RecordFault(record.key, str(error)) from None

    def caption(self, record: Record, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, words) of one of its captions."""
        if record.token_ids is None:
            found = self.tokenizer.encode(record.captions[number], self.max_tokens)
        else:
            found = self.tokenizer.enclose(record.token_ids[number], self.max_tokens)
        return self.tokenizer.fill(*found, self.max_tokens) if self.fills else found

    def _page_text(self, page: PageWords) -> Words:
        """Every piece of a word has its box; [CLS] has a corner's, [SEP] the other corner's, as LayoutLM has them."""
        ids, words = self.tokenizer.encode_words(page.words, self.max_tokens)
        boxes = np.where(words[:, None] < 0, 0, page.boxes[words])
        boxes[-1] = GRID
        return Words(ids, words, boxes=boxes.astype(np.int32), lines=np.where(words < 0, -1, page.lines[words]))

    def _image(self, record: Record, epoch: int, example: int) -> Patches | Regions | Pixels | None:
        if (found := record.detections) is not None:
            return Regions(torch.from_numpy(found.features), torch.from_numpy(found.boxes))
        if self.transform is None:
            return None
        random = self.random(epoch, example, Purpose.IMAGE)
        if self.as_pixels:
            values = torch.from_numpy(self.transform.pixels(record.image, random))
            return Pixels(values[None], torch.from_numpy(grid_positions(*self.transform.max_grid)))
        values, positions = self.transform(record.image, random)
        if self.max_patches is not None and len(values) > self.max_patches:
            kept = np.sort(random.choice(len(values), self.max_patches, replace=False))
            values, positions = values[kept], positions[kept]
        return Patches(torch.from_numpy(values), torch.from_numpy(positions))


def objects_of(record: Record) -> Objects:
    """The regions of a record, whose picture is shown whole."""
    width, height = record.image.size
    boxes = np.asarray([region.box for region in record.regions], dtype=np.float64).reshape(-1, 4)
    (left, top), (right, bottom) = boxes[:, :2].T, boxes[:, 2:].T
    for region, right_side_out in zip(record.regions, (left < right) & (top < bottom), strict=True):
        inside = right_side_out and min(region.box) >= 0 and region.box[2] <= width and region.box[3] <= height
        if not inside or region.kind is None:
            what = "has no class" if inside else f"does not lie in its picture of {width} x {height} pixels"
            raise RecordFault(record.key, f"region {list(region.box)} {what}")
    shares = np.stack((left + right, top + bottom, 2 * (right - left), 2 * (bottom - top)), axis=1) / 2
    return Objects(
        vk.SegmentLayout([[len(boxes)]]),
        torch.from_numpy((shares / [width, height, width, height]).astype(np.float32)),
        torch.tensor([region.kind for region in record.regions], dtype=torch.int64),
        torch.tensor([-1 if region.attribute is None else region.attribute for region in record.regions], dtype=torch.int64),
    )


def purpose_of(objective: str) -> int:
    """What an objective's draws are for, beside the numbers of `Purpose`."""
    return int.from_bytes(blake2b(objective.encode(), digest_size=8).digest(), "little")
