"""From a record to a sample: one caption, tokenized and masked, and the picture as patches or regions."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import Patches, Regions
from engine.config import Config
from engine.data.corruption import choose_regions, corrupt
from engine.data.images import ImageTransform
from engine.data.plan import Purpose, generator
from engine.data.records import Record, RecordFault
from engine.data.tokenization import Tokenizer

REGION_TASKS = ("masked_region_features", "masked_region_classes")


@dataclass
class Sample:
    """What `collate` puts beside others: a picture, and its caption before and after corruption."""

    text_ids: np.ndarray
    image: Patches | Regions
    identity: int
    masked_ids: np.ndarray | None = None
    masked_positions: np.ndarray | None = None
    masked_regions: np.ndarray | None = None
    soft_labels: np.ndarray | None = None
    """float32 [masked regions, C], where the task needs them."""
    own_image: bool | None = None
    """Whether the picture is the caption's own, where others may take its place."""


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
        self, config: Config, tokenizer: Tokenizer, train: bool, tasks: Collection[str], stream: int = 0
    ) -> None:
        self.seed = config.seed if train else 0  # evaluations with different seeds stay comparable
        self.stream = stream
        self.train = train
        self.tokenizer = tokenizer
        self.transform = None if config.data.regions else image_transform(config, train)
        self.max_tokens = config.data.max_caption_tokens
        objectives = config.objectives
        self.masking = objectives.masked_language if "masked_language" in tasks else None
        self.region_shares = [getattr(objectives, task).probability for task in REGION_TASKS if task in tasks]
        self.needs_soft_labels = "masked_region_classes" in tasks

    def __call__(self, record: Record, epoch: int, example: int, caption: int | None = None) -> Sample:
        """`caption`: which of the record's; None: one drawn for training, the first for evaluation."""
        ids, words = self._text(record, epoch, example, caption)
        sample = Sample(ids, self._image(record, epoch, example), record.identity)
        if self.masking is not None:
            self._mask_words(sample, words, self._random(epoch, example, Purpose.MASK))
        if self.region_shares:
            self._mask_regions(sample, record, self._random(epoch, example, Purpose.REGIONS))
        return sample

    def _random(self, epoch: int, example: int, purpose: Purpose) -> np.random.Generator:
        return generator(self.seed, epoch, example, purpose, self.stream)

    def _text(
        self, record: Record, epoch: int, example: int, caption: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        count = len(record.captions if record.token_ids is None else record.token_ids)
        if caption is None:
            draws = self.train and count > 1
            caption = self._random(epoch, example, Purpose.CAPTION).integers(count) if draws else 0
        if record.token_ids is None:
            return self.tokenizer.encode(record.captions[caption], self.max_tokens)
        try:
            return self.tokenizer.enclose(record.token_ids[caption], self.max_tokens)
        except ValueError as error:
            raise RecordFault(record.key, str(error)) from None

    def _image(self, record: Record, epoch: int, example: int) -> Patches | Regions:
        if self.transform is None:
            found = record.detections
            return Regions(torch.from_numpy(found.features), torch.from_numpy(found.boxes))
        values, positions = self.transform(record.image, self._random(epoch, example, Purpose.IMAGE))
        return Patches(torch.from_numpy(values), torch.from_numpy(positions))

    def _mask_words(self, sample: Sample, words: np.ndarray, random: np.random.Generator) -> None:
        options = self.masking
        sample.masked_ids, sample.masked_positions = corrupt(
            sample.text_ids,
            words,
            self.tokenizer,
            options.probability,
            options.whole_word,
            random,
            options.when_none,
        )

    def _mask_regions(self, sample: Sample, record: Record, random: np.random.Generator) -> None:
        (share,) = self.region_shares  # no two of these objectives share a batch
        chosen = choose_regions(len(record.detections.boxes), share, random)
        sample.masked_regions = chosen
        if self.needs_soft_labels:
            if record.detections.soft_labels is None:
                raise RecordFault(record.key, "no soft labels, which masked_region_classes needs")
            sample.soft_labels = record.detections.soft_labels[chosen]
