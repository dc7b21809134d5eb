"""UNITER's databases read as published: captions as ids in one LMDB, regions of their pictures in another."""

from pathlib import Path
from typing import Any

import lz4.frame
import msgpack
import numpy as np

from engine.data.records.index_cache import cached_index
from engine.data.records.record import (
    DataError,
    Detections,
    ExampleIndex,
    FaultLedger,
    Record,
    RecordFault,
    Texts,
)
from engine.data.sources.lmdb_file import read_value
from engine.data.sources.uniter_images import ImageDatabase, read_json
from engine.data.tokenization.tokenizer import Tokenizer
from engine.sections import Regions

_MAX_TEXT_BYTES = 1 << 20
_BORDERS = 2  # [CLS] and [SEP], which the ids lack


class UniterDatabases:
    """The texts of a text database with the regions of their pictures. Safe in forked and spawned workers.

    Texts of more than `max_tokens`, [CLS] and [SEP] included, are left out as in the original, not cut.
    """

    def __init__(
        self,
        texts: Path,
        images: Path,
        max_tokens: int,
        regions: Regions,
        cache: Path,
        ledger: FaultLedger,
        max_records: int | None = None,
    ) -> None:
        self.folder = texts
        self.max_tokens = max_tokens
        self.images = ImageDatabase(images, regions)
        self.cache = cache
        self.ledger = ledger
        self.meta = read_json(texts / "meta.json", object)
        self.vocabulary = _vocabulary(texts, self.meta)
        lengths, pictures = read_json(texts / "id2len.json", int), read_json(texts / "txt2img.json", object)
        names = [name for name, length in lengths.items() if length + _BORDERS <= max_tokens][:max_records]
        if not names:
            raise DataError(f"{texts} has no text of at most {max_tokens} tokens, of {len(lengths)}")
        shown = [_picture_name(pictures.get(name)) for name in names]
        self._names = np.asarray([name.encode() for name in names])
        self._lengths = np.asarray([lengths[name] for name in names], dtype=np.int32)
        self._pictures, self._image_of = np.unique([name.encode() for name in shown], return_inverse=True)
        read_value(texts, self._names[0])  # so that a broken one is refused now

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        texts = self.texts(index)
        identity, detections = self.detections(self.image_of(index))
        return Record(texts.key, None, [], [], identity, (), detections, texts.token_ids)

    def captions(self, index: int) -> list[str]:
        raise DataError(
            f"{self.folder} holds ids in place of captions: tokenizer.path must name the tokenizer they were "
            f"made with ({self._maker()})"
        )

    def texts(self, index: int) -> Texts:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        key = self._key(index)
        value = read_value(self.folder, bytes(self._names[index]))
        if value is None:
            raise RecordFault(key, "id2len.json names it, the LMDB lacks it")
        example = _unpack(key, value)
        ids = _checked_ids(key, example.get("input_ids"), self.vocabulary["v_range"][1])
        if len(ids) != self._lengths[index]:
            raise RecordFault(key, f"{len(ids)} ids, id2len.json says {self._lengths[index]}")
        picture = self._picture(self.image_of(index))
        if _picture_name(example.get("img_fname")) != picture:
            raise RecordFault(
                key, f"its picture is {example.get('img_fname')!r}, txt2img.json says {picture!r}"
            )
        return Texts(key, [], [ids])

    @property
    def num_images(self) -> int:
        return len(self._pictures)

    def image_of(self, index: int) -> int:
        return int(self._image_of[index])

    def identity(self, image: int) -> int:
        return self.images.identity(self._picture(image))

    def detections(self, image: int, soft_labels: bool = True) -> tuple[int, Detections]:
        return self.images.detections(self._picture(image), soft_labels)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        own = {
            "CLS": tokenizer.cls_id,
            "SEP": tokenizer.sep_id,
            "MASK": tokenizer.mask_id,
            "v_range": [tokenizer.model.token_to_id("!"), tokenizer.vocab_size],
        }
        if own != self.vocabulary:
            theirs, ours = (
                ", ".join(f"{name} {value}" for name, value in one.items()) for one in (self.vocabulary, own)
            )
            raise DataError(
                f"{self.folder} was made with another tokenizer ({self._maker()}): its meta.json says "
                f"{theirs}; the run's has {ours}"
            )

    def index(self, tokenizer: Tokenizer, max_tokens: int) -> ExampleIndex:
        assert max_tokens == self.max_tokens
        self.check_tokenizer(tokenizer)
        state = (self.folder / "data.mdb").stat()
        content = [
            (str(self.folder.resolve()), state.st_size, state.st_mtime_ns, len(self), max_tokens),
            self.images.state(),
        ]
        return cached_index(self.cache, content, self.ledger, self._build_index)

    def _build_index(self, ledger: FaultLedger) -> ExampleIndex:
        regions = np.zeros(self.num_images, dtype=np.int32)
        for image in range(self.num_images):
            try:
                regions[image] = self.images.count(self._picture(image))
            except RecordFault as fault:
                ledger.add(f"{fault}, left out with its {(self._image_of == image).sum()} texts")
        records = np.flatnonzero(regions[self._image_of]).astype(np.int32)
        return ExampleIndex(
            records=records,
            captions=np.zeros_like(records),
            tokens=self._lengths[records] + _BORDERS,
            images=self._image_of[records].astype(np.int32),
            regions=regions,
        )

    def _maker(self) -> str:
        return str(self.meta.get("tokenizer", self.meta.get("bert", "its meta.json does not say which")))

    def _picture(self, image: int) -> str:
        return self._pictures[image].decode()

    def _key(self, index: int) -> str:
        return f"{self.folder}/{self._names[index].decode()}"


def _vocabulary(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    names = ("CLS", "SEP", "MASK", "v_range")
    if missing := [name for name in names if name not in meta]:
        raise DataError(f"{folder}/meta.json lacks {', '.join(missing)}")
    limits = meta["v_range"]
    if not isinstance(limits, list) or [type(limit) for limit in limits] != [int, int]:
        raise DataError(f"{folder}/meta.json: v_range must be two integers, got {limits!r}")
    return {name: meta[name] for name in names}


def _picture_name(value: Any) -> str:
    """Empty where it is not one name."""
    return value if isinstance(value, str) else ""


def _unpack(key: str, value: bytes) -> dict[str, Any]:
    try:
        frame = lz4.frame.LZ4FrameDecompressor()
        data = frame.decompress(value, max_length=_MAX_TEXT_BYTES)
        if not frame.eof:
            raise RecordFault(key, f"lz4 frame is cut, or of more than {_MAX_TEXT_BYTES} bytes")
        example = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except RecordFault:
        raise
    except Exception as error:  # lz4 and msgpack raise many types on broken values
        raise RecordFault(key, f"text cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(example, dict):
        raise RecordFault(key, f"text must be a map, got {type(example).__name__}")
    return example


def _checked_ids(key: str, ids: Any, vocabulary: int) -> list[int]:
    if not isinstance(ids, list) or not ids or any(type(one) is not int for one in ids):
        raise RecordFault(key, "input_ids must be a list of integers, at least one")
    if wrong := [one for one in ids if not 0 <= one < vocabulary]:
        raise RecordFault(key, f"input_ids must be in [0, {vocabulary}), got {wrong[0]}")
    return ids
