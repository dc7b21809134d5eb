"""From a record to a sample: one caption, tokenized, the picture as patches or regions, and what objectives add."""

from collections.abc import Collection
from functools import partial
from hashlib import blake2b

import numpy as np
import torch

from engine.batch import Patches, Regions, Sample, Words
from engine.config import Config
from engine.data.images import ImageTransform
from engine.data.plan import Purpose, generator
from engine.data.records import Record, RecordFault
from engine.data.tokenization import Tokenizer
from engine.objectives import Objective
from engine.objectives.parts.objective import Draw


def image_transform(config: Config, train: bool = False) -> ImageTransform:
    """The transform of a run: with its random choices for training, without them for evaluation."""
    data = config.data
    return ImageTransform(
        size=data.image_size,
        patch=config.model.image.patch_size,
        max_grid=tuple(config.model.image.max_grid),
        mean=data.image_mean,
        std=data.image_std,
        resize=data.resize,
        random_crop=data.random_crop if train else "none",
        random_crop_scale=data.random_crop_scale,
        flip=data.flip and train,
    )


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
        self.transform = None if config.data.regions else image_transform(config, train)
        self.max_tokens = config.data.max_caption_tokens
        self.objectives = objectives
        self.needs_soft_labels = any(objective.needs_soft_labels for objective in objectives)

    def __call__(
        self, record: Record, epoch: int, example: int, caption: int | None = None, own_image: bool | None = None
    ) -> Sample:
        """`caption`: which of the record's; None: one drawn for training, the first for evaluation."""
        labels = None if record.detections is None else record.detections.soft_labels
        text, image = self._text(record, epoch, example, caption), self._image(record, epoch, example)
        sample = Sample(text, image, record.identity, labels, own_image)
        for objective in self.objectives:
            draw = Draw(self.tokenizer, partial(self._random, epoch, example, purpose_of(objective.name)))
            try:
                objective.prepare(sample, draw)
            except ValueError as error:
                raise RecordFault(record.key, str(error)) from None
        return sample

    def _random(self, epoch: int, example: int, purpose: int) -> np.random.Generator:
        return generator(self.seed, epoch, example, purpose, self.stream)

    def _text(self, record: Record, epoch: int, example: int, caption: int | None) -> Words:
        count = len(record.captions if record.token_ids is None else record.token_ids)
        if caption is None:
            draws = self.train and count > 1
            caption = self._random(epoch, example, Purpose.CAPTION).integers(count) if draws else 0
        if record.token_ids is None:
            return Words(*self.tokenizer.encode(record.captions[caption], self.max_tokens))
        try:
            return Words(*self.tokenizer.enclose(record.token_ids[caption], self.max_tokens))
        except ValueError as error:
            raise RecordFault(record.key, str(error)) from None

    def _image(self, record: Record, epoch: int, example: int) -> Patches | Regions:
        if self.transform is None:
            found = record.detections
            return Regions(torch.from_numpy(found.features), torch.from_numpy(found.boxes))
        values, positions = self.transform(record.image, self._random(epoch, example, Purpose.IMAGE))
        return Patches(torch.from_numpy(values), torch.from_numpy(positions))


def purpose_of(objective: str) -> int:
    """What an objective's draws are for, beside the numbers of `Purpose`."""
    return int.from_bytes(blake2b(objective.encode(), digest_size=8).digest(), "little")
