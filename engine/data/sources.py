"""From the data section of a run to a source of records: built-in sets, shards, permuted captions."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from engine.config import Config
from engine.data import builtin
from engine.data.plan import Permutation, Purpose
from engine.data.records import FaultLedger, Record, RecordFault, Source
from engine.data.shards import ShardSource, expand_pattern
from engine.data.tokenization import Tokenizer, load_tokenizer, train_tokenizer
from engine.sections import Data

Split = Literal["train", "held_out"]


class PermutedCaptions:
    """A control experiment: the same images and captions, but the captions given to other images."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source = source
        self.permutation = Permutation(len(source), seed, 0, Purpose.PERMUTED_CAPTIONS)

    @property
    def ledger(self) -> FaultLedger:
        return self.source.ledger

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return dataclasses.replace(self.source[index], captions=self.captions(index), regions=[])

    def captions(self, index: int) -> list[str]:
        return self.source.captions(int(self.permutation(np.asarray([index]))[0]))


def load_source(data: Data, split: Split, seed: int = 0) -> Source:
    """The records of data.source ("train") or data.held_out ("held_out"), one pattern after another."""
    patterns = data.source if split == "train" else data.held_out
    cache = Path(data.cache)
    shards: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        shards += (
            builtin.shards(pattern, split, cache) if pattern in builtin.NAMES else expand_pattern(pattern)
        )
    source = ShardSource(
        shards, data.caption_keys, data.max_image_pixels, cache, data.fault_limit, data.max_records
    )
    return PermutedCaptions(source, seed) if data.permute_captions and split == "train" else source


def make_tokenizer(config: Config, source: Source) -> Tokenizer:
    """tokenizer.path loaded, or a tokenizer trained on the captions of `source`, the training source."""
    options = config.tokenizer
    if options.path is not None:
        return load_tokenizer(options.path)
    return train_tokenizer(usable_captions(source), options.kind, options.vocab_size, options.lowercase)


def usable_captions(source: Source) -> Iterator[str]:
    """Every caption of every record that has one; the others are named in the source's ledger."""
    for index in range(len(source)):
        try:
            yield from source.captions(index)
        except RecordFault as fault:
            source.ledger.add(fault)
