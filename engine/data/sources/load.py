"""From the data section of a run to a source of records: built-in sets, shards, documents, folders, databases."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from engine.data.builtin import folder_sets, picture_sets
from engine.data.plan.order import Permutation, Purpose
from engine.data.records.record import (
    DataError,
    Detections,
    ExampleIndex,
    FaultLedger,
    MissingData,
    Record,
    RecordFault,
    Source,
    Texts,
)
from engine.data.sources.detector import SceneSource
from engine.data.sources.documents import EXTENSIONS, DocumentSource
from engine.data.sources.folders import CLASSES, PAGES, PREFIXES, ClassFolder, PageFolder, class_names_of
from engine.data.sources.shards import ShardSource, expand_pattern
from engine.data.tokenization.tokenizer import Tokenizer
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
        self.identity = source.identity
        self.detections = source.detections
        self.check_tokenizer = source.check_tokenizer

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
    """Several sources of one sort, one after the other."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        self.ledger = sources[0].ledger
        self._starts = np.cumsum([0, *map(len, sources)])
        self._first_images = np.cumsum([0, *(getattr(source, "num_images", 0) for source in sources)])
        self.kind, self.class_names = kind_of(sources[0]), _class_names(sources[0])
        if any((kind_of(source), _class_names(source)) != (self.kind, self.class_names) for source in sources):
            raise DataError("data.source joins records of different kinds, or with other classes: make them data.sets")

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

    def identity(self, image: int) -> int:
        part, place = _part(self._first_images, image)
        return self.sources[part].identity(place)

    def detections(self, image: int, soft_labels: bool = True) -> tuple[int, Detections]:
        part, place = _part(self._first_images, image)
        return self.sources[part].detections(place, soft_labels)

    def described(self, index: int) -> Record:
        part, place = _part(self._starts, index)
        return self.sources[part].described(place)

    def picture(self, index: int) -> tuple[Image.Image, int]:
        part, place = _part(self._starts, index)
        return self.sources[part].picture(place)

    def state(self) -> list[Any]:
        return [source.state() for source in self.sources]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        for source in self.sources:
            source.check_tokenizer(tokenizer)

    def index(self, tokenizer: Tokenizer, max_tokens: int) -> ExampleIndex:
        parts = [source.index(tokenizer, max_tokens) for source in self.sources]
        starts, firsts = (counts[:-1].astype(np.int32) for counts in (self._starts, self._first_images))
        return ExampleIndex(
            records=np.concatenate([part.records + start for part, start in zip(parts, starts, strict=True)]),
            captions=np.concatenate([part.captions for part in parts]),
            tokens=np.concatenate([part.tokens for part in parts]),
            images=np.concatenate([part.images + start for part, start in zip(parts, firsts, strict=True)]),
            regions=np.concatenate([part.regions for part in parts]),
        )


def kind_of(source: Source) -> Literal["pictures", "documents", "pages"]:
    """What its records are."""
    return getattr(source, "kind", "pictures")


def _class_names(source: Source) -> tuple[str, ...]:
    """Of sources whose records have classes; empty for others."""
    return getattr(source, "class_names", ())


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
            sources.append(_open_or_say_what_else(data, split, group, left, ledger))
    source = sources[0] if len(sources) == 1 else JoinedSources(sources)
    if not data.permute_captions or split != "train":
        return source
    if not hasattr(sources[0], "num_images"):
        raise DataError("data.permute_captions gives captions to other pictures: documents, pages and classes have none")
    return PermutedCaptions(source, seed)


def _open_or_say_what_else(
    data: Data, split: Split, patterns: list[str], max_records: int | None, ledger: FaultLedger
) -> Source:
    """The published data of a recipe are on few disks; it has others for trials."""
    try:
        return _open(data, split, patterns, max_records, ledger)
    except MissingData as missing:
        if data.tiny_source is None:
            raise
        raise DataError(f"{missing}; --tiny true trains on {data.tiny_source}") from None


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
    if _is_documents(pattern):
        return "documents"
    alone = _PLUS in pattern or pattern.startswith(PREFIXES) or pattern in folder_sets.NAMES
    return pattern if alone or (pattern in picture_sets.NAMES and data.regions is not None) else "shards"


def _is_documents(pattern: str) -> bool:
    return pattern == folder_sets.TEXT or pattern.endswith(EXTENSIONS)


def _open_databases(data: Data, pattern: str, max_records: int | None, ledger: FaultLedger) -> Source:
    if data.regions is None:
        raise DataError(f"{pattern} are UNITER's databases of regions: data.regions must say which")
    try:
        from engine.data.sources.uniter import UniterDatabases
    except ModuleNotFoundError as error:
        raise DataError(
            f"{pattern} needs the package {error.name}: pip install 'vlkernels[uniter]'"
        ) from None
    folders = [Path(part.strip()).expanduser() for part in pattern.split(_PLUS)]
    if len(folders) != 2:
        raise DataError(f"{pattern!r} must be two folders, TEXT_DB + IMAGE_DB")
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise MissingData(f"{pattern}: no folder {' and no '.join(missing)}")
    limit, cache = data.max_caption_tokens, Path(data.cache)
    return UniterDatabases(*folders, limit, data.regions, cache, ledger, max_records)


def _open(
    data: Data, split: Split, patterns: list[str], max_records: int | None, ledger: FaultLedger
) -> Source:
    first = patterns[0]
    if _PLUS in first:
        return _open_databases(data, first, max_records, ledger)
    if _kind(data, first) == "shards" or first in picture_sets.NAMES:
        return _open_shards(data, split, patterns, max_records, ledger)
    if data.regions is not None:
        raise DataError(f"{first} has no regions, which data.regions asks for")
    if _is_documents(first):
        return _open_documents(data, split, patterns, max_records, ledger)
    return _open_folder(data, split, first, max_records, ledger)


def _open_documents(
    data: Data, split: Split, patterns: list[str], max_records: int | None, ledger: FaultLedger
) -> Source:
    cache, files = Path(data.cache), list[Path]()
    for pattern in patterns:
        named = pattern == folder_sets.TEXT
        files += [folder_sets.documents_file(split, cache)] if named else expand_pattern(pattern)
    return DocumentSource(files, cache, ledger, max_records)


def _open_folder(
    data: Data, split: Split, pattern: str, max_records: int | None, ledger: FaultLedger
) -> Source:
    folder = _folder(data, split, pattern)
    if pattern.startswith(PAGES) or pattern == folder_sets.PAGES:
        return PageFolder(folder, data.max_image_pixels, ledger, max_records)
    trained = data.source if isinstance(data.source, str) else data.source[0]
    known = trained.startswith(CLASSES) or trained == folder_sets.GLYPH_CLASSES
    names = class_names_of(_folder(data, "train", trained)) if known else None
    return ClassFolder(folder, data.max_image_pixels, ledger, max_records, names)


def _folder(data: Data, split: Split, pattern: str) -> Path:
    if pattern in folder_sets.NAMES:
        return folder_sets.folder(pattern, split, Path(data.cache))
    folder = Path(pattern.partition(":")[2]).expanduser()
    if not folder.is_dir():
        raise MissingData(f"{pattern}: no such folder")
    return folder


def _open_shards(
    data: Data, split: Split, patterns: list[str], max_records: int | None, ledger: FaultLedger
) -> Source:
    first, cache, kind, options = patterns[0], Path(data.cache), ShardSource, {}
    if data.regions is not None:
        options["regions"] = data.regions
        if first == picture_sets.SCENES:
            kind = SceneSource
        elif first in picture_sets.NAMES:
            raise DataError(f'"{first}" has no regions, which data.regions asks for; "{picture_sets.SCENES}" has')
    shards: list[Path] = []
    for pattern in patterns:
        named = pattern in picture_sets.NAMES
        shards += picture_sets.shards(pattern, split, cache) if named else expand_pattern(pattern)
    return kind(shards, data.caption_keys, data.max_image_pixels, cache, ledger, max_records, **options)


def usable_captions(source: Source) -> Iterator[str]:
    """Every caption of every record that has one; the others are named in the source's ledger."""
    for index in range(len(source)):
        try:
            yield from source.captions(index)
        except RecordFault as fault:
            source.ledger.add(fault)
