"""Tar shards in the layout of img2dataset and webdataset, read map-style: any record at any time."""

import glob
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.records.index_cache import build_index, cached_index
from engine.data.records.record import (
    MAX_CAPTION_CHARACTERS,
    MAX_JSON_BYTES,
    DataError,
    Detections,
    ExampleIndex,
    FaultLedger,
    MissingData,
    Record,
    RecordFault,
    Texts,
    clean_captions,
    decode_image,
    decode_json,
    decode_text,
    image_identity,
    parse_regions,
)
from engine.data.records.regions import ARRAYS, MAX_BYTES, count_regions, read_npz, select_regions
from engine.data.sources.tar_index import ROLES, load_index
from engine.data.tokenization.tokenizer import Tokenizer
from engine.sections import Regions

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000
_MAX_TEXT_BYTES = 4 * MAX_CAPTION_CHARACTERS + 4  # one character more than is kept, so that a cut is noticed
_MAX_OPEN_SHARDS = 128


def expand_pattern(pattern: str) -> list[Path]:
    """The shards that a pattern names: a path, with {00000..00012} ranges and * ? [] wildcards.

    >>> [str(path) for path in expand_pattern("cc3m/{0008..0010}.tar")]
    ['cc3m/0008.tar', 'cc3m/0009.tar', 'cc3m/0010.tar']
    """
    names = [os.path.expanduser(pattern)]
    while ranges := _RANGE.search(names[0]):
        low, high = ranges.groups()
        count = int(high) - int(low) + 1
        if not 0 < count * len(names) <= _MAX_SHARDS:
            raise DataError(f"{pattern} names {count * len(names)} shards, must be 1 to {_MAX_SHARDS}")
        numbers = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
        names = [_RANGE.sub(number, name, count=1) for name in names for number in numbers]
    paths: list[Path] = []
    for name in names:
        paths += [Path(found) for found in sorted(glob.glob(name))] if glob.has_magic(name) else [Path(name)]
    if not paths:
        raise DataError(f"{pattern} names no shard")
    return paths


def require_files(name: str, files: list[Path]) -> None:
    """Refuse what is not there, and folders."""
    missing = [file for file in files if not file.is_file()]
    if missing and missing[0].is_dir():
        raise MissingData("{0} is a folder: name its shards, {0}/*.tar, or write classes:{0} or pages:{0}".format(missing[0]))
    if missing:
        raise MissingData(f"{len(missing)} of {len(files)} {name} do not exist, the first is {missing[0]}")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "replace")


class ShardSource:
    """The records of some shards, in order. Safe to use in forked and spawned workers.

    With `regions` a record's picture is the regions in its KEY.npz.
    """

    picture_roles = {False: "image", True: "regions"}  # what a run without and one with regions needs
    reader = "npz"  # what makes the regions; a stored index is of one reader

    def __init__(
        self,
        shards: Iterable[Path],
        caption_keys: Iterable[str],
        max_image_pixels: int,
        cache: Path,
        ledger: FaultLedger,
        max_records: int | None = None,
        regions: Regions | None = None,
    ) -> None:
        self.shards = list(shards)
        self.caption_keys = tuple(caption_keys)
        self.max_image_pixels = max_image_pixels
        self.cache = cache
        self.regions = regions
        self.ledger = ledger
        self._descriptors: dict[int, int] = {}
        require_files("shards", self.shards)
        self._tables: list[np.ndarray] = []
        for shard in self.shards:
            index = load_index(shard, cache)
            for fault in index.faults:
                self.ledger.add(fault)
            role = self.picture_roles[regions is not None]
            there = index.table[role][:, 0] > 0
            for row in index.table[~there]:
                self.ledger.add(f"{shard}/{_text(row['key'])}: no {role}")
            self._tables.append(index.table[there])
        self._starts = np.cumsum([0, *map(len, self._tables)])
        self._length = min(int(self._starts[-1]), max_records or int(self._starts[-1]))
        if not len(self):
            raise DataError(
                f"no usable record in {len(self.shards)} shards ({', '.join(map(str, self.shards[:3]))}): "
                f"{self.ledger.summary()}"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        texts, content = self._described(index)
        key, captions, notes = texts.key, texts.captions, texts.notes
        if self.regions is not None:
            identity, detections = self.detections(index)
            return Record(key, None, captions, [], identity, notes, detections)
        data = self._read(*self._locate(index), "image")
        image = decode_image(key, data, self.max_image_pixels)
        regions = parse_regions(key, content.get("regions") or [])
        return Record(key, image, captions, regions, image_identity(data), notes)

    def captions(self, index: int) -> list[str]:
        return self.texts(index).captions

    def texts(self, index: int) -> Texts:
        return self._described(index)[0]

    @property
    def num_images(self) -> int:
        return len(self)

    def image_of(self, index: int) -> int:
        return index

    def identity(self, image: int) -> int:
        shard, row = self._locate(image)
        return image_identity(self._read(shard, row, self.picture_roles[self.regions is not None]))

    def detections(self, image: int, soft_labels: bool = True) -> tuple[int, Detections]:
        assert self.regions is not None
        data, arrays = self._region_arrays(image, ARRAYS if soft_labels else ARRAYS[:-1])
        return image_identity(data), select_regions(self._name(*self._locate(image)), arrays, self.regions)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Any will do: captions are text."""

    def index(self, tokenizer: Tokenizer, max_tokens: int) -> ExampleIndex:
        states = [(str(shard.resolve()), os.stat(shard)) for shard in self.shards]
        content = [
            self.reader,
            *((path, state.st_size, state.st_mtime_ns) for path, state in states),
            (self.caption_keys, len(self), self.regions),
            (tokenizer.model.to_str(), max_tokens),
        ]
        build = partial(build_index, self, self._count_regions, tokenizer, max_tokens)
        return cached_index(self.cache, content, self.ledger, build)

    def _count_regions(self, image: int) -> int:
        assert self.regions is not None
        _, arrays = self._region_arrays(image, ("conf",))
        return count_regions(self._name(*self._locate(image)), arrays, self.regions)

    def _region_arrays(self, image: int, names: Iterable[str]) -> tuple[bytes, dict[str, np.ndarray]]:
        """(what the picture is known by, those of its arrays that there are)."""
        shard, row = self._locate(image)
        key = self._name(shard, row)
        if row["regions"][1] > MAX_BYTES:
            raise RecordFault(key, f"npz of {row['regions'][1]} bytes, the limit is {MAX_BYTES}")
        data = self._read(shard, row, "regions")
        return data, read_npz(key, data, names)

    def _described(self, index: int) -> tuple[Texts, dict[str, Any]]:
        """(captions, content of the json)."""
        shard, row = self._locate(index)
        key = self._name(shard, row)
        content = self._json(shard, row, key)
        captions, notes = self._captions(shard, row, key, content)
        return Texts(key, captions, notes=notes), content

    def _locate(self, index: int) -> tuple[int, np.void]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, self._tables[shard][index - self._starts[shard]]

    def _name(self, shard: int, row: np.void) -> str:
        return f"{self.shards[shard]}/{_text(row['key'])}"

    def _captions(
        self, shard: int, row: np.void, key: str, content: dict[str, Any]
    ) -> tuple[list[str], tuple[str, ...]]:
        """Of the first of `caption_keys` that there is: "txt" is the .txt member, others are json keys."""
        for name in self.caption_keys:
            if name == "txt" and row["text"][0]:
                size = int(row["text"][1])
                text = decode_text(
                    key, self._read(shard, row, "text", _MAX_TEXT_BYTES), complete=size <= _MAX_TEXT_BYTES
                )
                return clean_captions(key, text)
            if content.get(name) is not None:
                return clean_captions(key, content[name])
        raise RecordFault(key, f"no caption under {', '.join(self.caption_keys)}")

    def _json(self, shard: int, row: np.void, key: str) -> dict[str, Any]:
        if not row["json"][0]:
            return {}
        if row["json"][1] > MAX_JSON_BYTES:
            raise RecordFault(key, f"json of {row['json'][1]} bytes, the limit is {MAX_JSON_BYTES}")
        return decode_json(key, self._read(shard, row, "json"))

    def _read(self, shard: int, row: np.void, role: str, limit: int | None = None) -> bytes:
        assert role in ROLES
        offset, size = (int(value) for value in row[role])
        size = size if limit is None else min(size, limit)
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) != size:
            raise RecordFault(
                self._name(shard, row), f"{len(data)} of {size} bytes of its {role} could be read"
            )
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._descriptors[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)
