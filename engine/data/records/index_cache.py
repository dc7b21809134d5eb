"""The examples of a source that reads regions: which there are and how long, kept on disk."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.records.cache_folder import write_folder
from engine.data.records.record import ExampleIndex, FaultLedger, RecordFault, Source
from engine.data.tokenization.tokenizer import Tokenizer

_FORMAT = "vlkernels examples 1"
_TABLES = ("records", "captions", "tokens", "images", "regions")


def build_index(
    source: Source,
    count_regions: Callable[[int], int],
    tokenizer: Tokenizer,
    max_tokens: int,
    ledger: FaultLedger,
) -> ExampleIndex:
    """Of a source with one picture per record; what cannot be read is named in `ledger` and left out."""
    rows: list[tuple[int, int, int]] = []
    regions = np.zeros(len(source), dtype=np.int32)
    for record in range(len(source)):
        try:
            captions = source.captions(record)
            regions[record] = count_regions(record)
        except RecordFault as fault:
            ledger.add(fault)
            continue
        rows += [
            (record, place, len(tokenizer.encode(caption, max_tokens)[0]))
            for place, caption in enumerate(captions)
        ]
    records, captions, tokens = np.asarray(rows, dtype=np.int32).reshape(-1, 3).T.copy()
    return ExampleIndex(records, captions, tokens, records, regions)


def cached_index(
    cache: Path, content: list[Any], ledger: FaultLedger, build: Callable[[FaultLedger], ExampleIndex]
) -> ExampleIndex:
    """What `build` gives, kept under the digest of `content`; the faults it names are kept with it."""
    digest = hashlib.blake2b(repr([_FORMAT, *content]).encode(), digest_size=16).hexdigest()
    path = cache / "indices" / f"examples-{digest}.index"
    if (stored := _read(path)) is None:
        found = FaultLedger(ledger.limit)
        stored = build(found), found.faults
        _write(path, *stored)
    index, faults = stored
    for fault in faults:
        ledger.add(fault)
    return index


def cached_arrays(
    cache: Path, kind: str, content: list[Any], build: Callable[[], Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """The arrays that `build` gives, kept under the digest of `content` and mapped from there, not read."""
    digest = hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()
    folder = cache / "indices" / f"{kind}-{digest}"
    if not folder.is_dir():
        write_folder(folder, partial(_write_arrays, build))
    return [np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("*.npy"))]


def _write_arrays(build: Callable[[], Sequence[np.ndarray]], folder: Path) -> None:
    for number, array in enumerate(build()):
        np.save(folder / f"{number}.npy", array, allow_pickle=False)


def _read(path: Path) -> tuple[ExampleIndex, list[str]] | None:
    """None when there is none, or a damaged one."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            tables = [np.lib.format.read_array(file, allow_pickle=False) for _ in _TABLES]
        if any(table.dtype != np.int32 or table.ndim != 1 for table in tables):
            return None
        return ExampleIndex(*tables), [str(fault) for fault in header["faults"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _write(path: Path, index: ExampleIndex, faults: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(json.dumps({"faults": faults}).encode() + b"\n")
        for name in _TABLES:
            np.lib.format.write_array(file, getattr(index, name), allow_pickle=False)
    os.replace(file.name, path)
