"""From a record to a sample: one caption, tokenized and masked, and the image cut into patches."""

from dataclasses import dataclass, replace

import numpy as np

from engine.config import Config
from engine.data.corruption import corrupt
from engine.data.images import ImageTransform
from engine.data.plan import Purpose, generator
from engine.data.records import Record
from engine.data.tokenization import Tokenizer


@dataclass(frozen=True)
class Sample:
    """What `collate` puts beside others: image patches and the caption before and after corruption."""

    patches: np.ndarray
    patch_positions: np.ndarray
    text_ids: np.ndarray
    identity: int
    masked_ids: np.ndarray | None = None
    masked_positions: np.ndarray | None = None


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
    """Record -> Sample. Every choice depends on (seed, epoch, record index) and on nothing else."""

    def __init__(self, config: Config, tokenizer: Tokenizer, train: bool) -> None:
        self.seed = config.seed if train else 0  # evaluations with different seeds stay comparable
        self.train = train
        self.tokenizer = tokenizer
        self.transform = image_transform(config, train)
        self.max_tokens = config.data.max_caption_tokens
        self.masking = config.objectives.masked_language

    def __call__(self, record: Record, epoch: int, index: int) -> Sample:
        caption = record.captions[0]
        if self.train and len(record.captions) > 1:
            choice = generator(self.seed, epoch, index, Purpose.CAPTION).integers(len(record.captions))
            caption = record.captions[choice]
        ids, words = self.tokenizer.encode(caption, self.max_tokens)
        patches, positions = self.transform(record.image, generator(self.seed, epoch, index, Purpose.IMAGE))
        sample = Sample(patches, positions, ids, record.identity)
        if self.masking is None:
            return sample
        random = generator(self.seed, epoch, index, Purpose.MASK)
        masked_ids, masked_positions = corrupt(
            ids, words, self.tokenizer, self.masking.probability, self.masking.whole_word, random
        )
        return replace(sample, masked_ids=masked_ids, masked_positions=masked_positions)
