"""Documents from text files and jsonl, read map-style: any document at any time.

In a .txt file a blank line ends a document. In a .jsonl file every line is one: {"text": string} or
{"sentences": [strings]}. Where each lies is found once and kept in a small index file; nothing else is read then.
"""

import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.data.records.index_cache import cached_arrays
from engine.data.records.record import DataError, FaultLedger, Record, RecordFault, Texts, image_identity
from engine.data.records.sentences import split_sentences
from engine.data.sources.shards import require_files

EXTENSIONS = (".txt", ".jsonl")
MAX_DOCUMENT_BYTES = 1 << 24
_CHUNK = 1 << 24


class DocumentSource:
    """The documents of some files, in order. Safe to use in forked and spawned workers."""

    kind = "documents"

    def __init__(
        self, files: Iterable[Path], cache: Path, ledger: FaultLedger, max_records: int | None = None
    ) -> None:
        self.files = list(files)
        self.cache = cache
        self.ledger = ledger
        require_files("files", self.files)
        self._spans = [self._index(file) for file in self.files]
        self._starts = np.cumsum([0, *map(len, self._spans)])
        self._length = min(int(self._starts[-1]), max_records or int(self._starts[-1]))
        if not len(self):
            raise DataError(f"no document in {len(self.files)} files ({', '.join(map(str, self.files[:3]))})")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        key, data, sentences = self._read(index)
        return Record(key, None, [], [], image_identity(data), sentences=sentences)

    def captions(self, index: int) -> list[str]:
        return self._read(index)[2]

    def texts(self, index: int) -> Texts:
        key, _, sentences = self._read(index)
        return Texts(key, sentences)

    def state(self) -> list[Any]:
        """Differs when the documents do."""
        states = [(str(file.resolve()), os.stat(file)) for file in self.files]
        return [(path, state.st_size, state.st_mtime_ns) for path, state in states] + [len(self)]

    def _index(self, file: Path) -> np.ndarray:
        """int64 [documents, 2]: offset and size of each."""
        state = os.stat(file)
        content = ["documents 1", str(file.resolve()), state.st_size, state.st_mtime_ns]
        spans = _lines if file.suffix == ".jsonl" else _paragraphs
        (found,) = cached_arrays(self.cache, "documents", content, partial(_spans_of, file, spans))
        return found

    def _read(self, index: int) -> tuple[str, bytes, list[str]]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, row = self.files[number], index - int(self._starts[number])
        key = f"{file}/{row}"
        offset, size = self._spans[number][row].tolist()
        if size > MAX_DOCUMENT_BYTES:
            raise RecordFault(key, f"document of {size} bytes, the limit is {MAX_DOCUMENT_BYTES}")
        with file.open("rb") as opened:
            opened.seek(offset)
            data = opened.read(size)
        sentences = _json_sentences(key, data) if file.suffix == ".jsonl" else _plain_sentences(key, data)
        if not sentences:
            raise RecordFault(key, "document has no text")
        return key, data, sentences


def _plain_sentences(key: str, data: bytes) -> list[str]:
    """A line ends a sentence."""
    try:
        lines = data.decode("utf-8-sig").splitlines()  # a file may begin with a byte order mark
    except UnicodeDecodeError:
        raise RecordFault(key, "document is not UTF-8") from None
    return [sentence for line in lines for sentence in split_sentences(line)]


def _json_sentences(key: str, data: bytes) -> list[str]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordFault(key, f"json cannot be read ({type(error).__name__})") from None
    given = content.get("sentences", content.get("text")) if isinstance(content, dict) else None
    if isinstance(given, str):
        found = [sentence for line in given.splitlines() for sentence in split_sentences(line)]
    elif isinstance(given, list) and all(isinstance(one, str) for one in given):
        found = [folded for one in given if (folded := " ".join(one.split()))]
    else:
        raise RecordFault(key, 'document must be {"text": string} or {"sentences": [strings]}')
    try:
        "".join(found).encode()
    except UnicodeEncodeError:  # json can spell surrogates; no tokenizer takes them
        raise RecordFault(key, "document is not valid Unicode") from None
    return found


def _spans_of(file: Path, spans: Any) -> tuple[np.ndarray]:
    with file.open("rb") as opened:
        return (np.asarray(list(spans(_line_spans(opened))), dtype=np.int64).reshape(-1, 2),)


def _line_spans(file: BinaryIO) -> Iterator[tuple[int, int, bool]]:
    """(offset, size with its line end, blank) of every line, however long."""
    offset, start, blank = 0, 0, True
    while chunk := file.read(_CHUNK):
        first = 0
        while (end := chunk.find(b"\n", first)) >= 0:
            yield start, offset + end + 1 - start, blank and not chunk[first:end].strip()
            start, first, blank = offset + end + 1, end + 1, True
        blank = blank and not chunk[first:].strip()
        offset += len(chunk)
    if offset > start:
        yield start, offset - start, blank


def _lines(lines: Iterator[tuple[int, int, bool]]) -> Iterator[tuple[int, int]]:
    return ((offset, size) for offset, size, blank in lines if not blank)


def _paragraphs(lines: Iterator[tuple[int, int, bool]]) -> Iterator[tuple[int, int]]:
    begin = end = None
    for offset, size, blank in lines:
        if not blank:
            begin, end = offset if begin is None else begin, offset + size
        elif begin is not None:
            yield begin, end - begin
            begin = None
    if begin is not None:
        yield begin, end - begin
