"""From the data section of a run to a source of records: built-in sets, shards, permuted captions."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from engine.data import builtin
from engine.data.detector import SceneSource
from engine.data.plan import Permutation, Purpose
from engine.data.records import (
    DataError,
    Detections,
    ExampleIndex,
    FaultLedger,
    Record,
    RecordFault,
    Source,
    Texts,
)
from engine.data.shards import ShardSource, expand_pattern
from engine.data.tokenization import Tokenizer
from engine.sections import Data

Split = Literal["train", "held_out"]
_PLUS = " + "  # between UNITER's text database and its image database


class PermutedCaptions:
    """A control experiment: the same images and captions, but the captions given to other images."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source = source
        self.permutation = Permutation(len(source), seed, 0, Purpose.PERMUTED_CAPTIONS)
        self.num_images = source.num_images
        self.image_of = source.image_of
        self.detections = source.detections

    @property
    def ledger(self) -> FaultLedger:
        return self.source.ledger

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        texts = self.texts(index)
        return dataclasses.replace(
            self.source[index], captions=texts.captions, token_ids=texts.token_ids, regions=[]
        )

    def captions(self, index: int) -> list[str]:
        return self.texts(index).captions

    def texts(self, index: int) -> Texts:
        return self.source.texts(int(self.permutation(np.asarray([index]))[0]))

    def index(self, tokenizer: Tokenizer, max_tokens: int) -> ExampleIndex:
        index = self.source.index(tokenizer, max_tokens)
        given_to = np.argsort(self.permutation(np.arange(len(self))))  # its inverse
        records = given_to[index.records].astype(np.int32)
        images = np.asarray([self.image_of(record) for record in records.tolist()], dtype=np.int32)
        whole = index.regions[images] > 0
        return dataclasses.replace(
            index,
            records=records[whole],
            captions=index.captions[whole],
            tokens=index.tokens[whole],
            images=images[whole],
        )


class JoinedSources:
    """Several sources, one after the other."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        self.ledger = sources[0].ledger
        self._starts = np.cumsum([0, *map(len, sources)])
        self._first_images = np.cumsum([0, *(source.num_images for source in sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        part, place = _part(self._starts, index)
        return self.sources[part][place]

    def captions(self, index: int) -> list[str]:
        return self.texts(index).captions

    def texts(self, index: int) -> Texts:
        part, place = _part(self._starts, index)
        return self.sources[part].texts(place)

    @property
    def num_images(self) -> int:
        return int(self._first_images[-1])

    def image_of(self, index: int) -> int:
        part, place = _part(self._starts, index)
        return int(self._first_images[part]) + self.sources[part].image_of(place)

    def detections(self, image: int, soft_labels: bool = True) -> tuple[int, Detections]:
        part, place = _part(self._first_images, image)
        return self.sources[part].detections(place, soft_labels)

    def index(self, tokenizer: Tokenizer, max_tokens: int) -> ExampleIndex:
        parts = [source.index(tokenizer, max_tokens) for source in self.sources]
        starts, first_images = self._starts.astype(np.int32), self._first_images.astype(np.int32)
        return ExampleIndex(
            records=np.concatenate(
                [part.records + start for part, start in zip(parts, starts, strict=False)]
            ),
            captions=np.concatenate([part.captions for part in parts]),
            tokens=np.concatenate([part.tokens for part in parts]),
            images=np.concatenate(
                [part.images + start for part, start in zip(parts, first_images, strict=False)]
            ),
            regions=np.concatenate([part.regions for part in parts]),
        )


def _part(starts: np.ndarray, index: int) -> tuple[int, int]:
    """(which part, place in it) of a number counted through all parts."""
    if not 0 <= index < starts[-1]:
        raise IndexError(f"{index} of {starts[-1]}")
    part = int(np.searchsorted(starts, index, side="right")) - 1
    return part, index - int(starts[part])


def load_source(data: Data, split: Split, seed: int = 0) -> Source:
    """The records of data.source ("train") or data.held_out ("held_out"), one pattern after another."""
    patterns = data.source if split == "train" else data.held_out
    ledger = FaultLedger(data.fault_limit)
    sources: list[Source] = []
    for group in _groups(data, [patterns] if isinstance(patterns, str) else patterns):
        left = None if data.max_records is None else data.max_records - sum(map(len, sources))
        if left is None or left > 0:
            sources.append(_open(data, split, group, left, ledger))
    source = sources[0] if len(sources) == 1 else JoinedSources(sources)
    return PermutedCaptions(source, seed) if data.permute_captions and split == "train" else source


def _groups(data: Data, patterns: list[str]) -> list[list[str]]:
    """Neighbours that one source reads: shards, or scenes; databases stand alone."""
    groups: list[list[str]] = []
    for pattern in patterns:
        last = groups[-1][0] if groups else None
        if last is None or _kind(data, pattern) != _kind(data, last) or _PLUS in pattern:
            groups.append([])
        groups[-1].append(pattern)
    return groups


def _kind(data: Data, pattern: str) -> str:
    special = _PLUS in pattern or (pattern in builtin.NAMES and data.regions is not None)
    return pattern if special else "shards"


def _open_databases(data: Data, pattern: str, max_records: int | None, ledger: FaultLedger) -> Source:
    if data.regions is None:
        raise DataError(f"{pattern} are UNITER's databases of regions: data.regions must say which")
    try:
        from engine.data.uniter import UniterDatabases
    except ModuleNotFoundError as error:
        raise DataError(
            f"{pattern} needs the package {error.name}: pip install 'vlkernels[uniter]'"
        ) from None
    folders = [Path(part.strip()).expanduser() for part in pattern.split(_PLUS)]
    if len(folders) != 2 or not all(folder.is_dir() for folder in folders):
        raise DataError(f"{pattern!r} must be two folders, TEXT_DB + IMAGE_DB")
    limit, cache = data.max_caption_tokens, Path(data.cache)
    return UniterDatabases(*folders, limit, data.regions, cache, ledger, max_records)


def _open(
    data: Data, split: Split, patterns: list[str], max_records: int | None, ledger: FaultLedger
) -> Source:
    first, cache, kind, options = patterns[0], Path(data.cache), ShardSource, {}
    if _PLUS in first:
        return _open_databases(data, first, max_records, ledger)
    if data.regions is not None:
        options["regions"] = data.regions
        if first == builtin.SCENES:
            kind = SceneSource
        elif first in builtin.NAMES:
            raise DataError(f'"{first}" has no regions, which data.regions asks for; "{builtin.SCENES}" has')
    shards: list[Path] = []
    for pattern in patterns:
        named = pattern in builtin.NAMES
        shards += builtin.shards(pattern, split, cache) if named else expand_pattern(pattern)
    return kind(shards, data.caption_keys, data.max_image_pixels, cache, ledger, max_records, **options)


def usable_captions(source: Source) -> Iterator[str]:
    """Every caption of every record that has one; the others are named in the source's ledger."""
    for index in range(len(source)):
        try:
            yield from source.captions(index)
        except RecordFault as fault:
            source.ledger.add(fault)
