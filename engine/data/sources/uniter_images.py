"""UNITER's image databases: regions by the name of the picture's npz, in one of the layouts it publishes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np

from engine.data.records.record import DataError, Detections, RecordFault, image_identity
from engine.data.records.regions import ARRAYS, MAX_BYTES, array_of, count_regions, read_npz, select_regions
from engine.data.sources.lmdb_file import read_value
from engine.sections import Regions

_KEYS = b"__keys__"


class ImageDatabase:
    """A folder with `feat_th0.2_max100_min10` (for the limits of data.regions) or `all`, or of npz files.

    The first two are LMDBs of msgpack values, or of npz values where "_compressed" is added to the name.
    """

    def __init__(self, folder: Path, options: Regions) -> None:
        self.folder = folder
        self.options = options
        limits = f"th{options.confidence:g}_max{options.max_count}_min{options.min_count}"
        self.store = _open_store(folder, f"feat_{limits}")
        self._counts: dict[str, int] | None = None
        if self.store.folder.name.startswith("feat_") and (counts := folder / f"nbb_{limits}.json").is_file():
            self._counts = read_json(counts, int)

    def state(self) -> tuple[Any, ...]:
        """Differs when the database does."""
        state = (self.store.folder / self.store.file).stat()
        return str(self.store.folder.resolve()), state.st_size, state.st_mtime_ns, self.options

    def count(self, name: str) -> int:
        """Number of regions of a picture that are used, without its features where that number is stored."""
        if self._counts is None:
            return count_regions(self._key(name), self._arrays(name, ("conf",)), self.options)
        if name not in self._counts:
            raise RecordFault(self._key(name), "no such picture")
        if self._counts[name] < 1:
            raise RecordFault(self._key(name), f"{self._counts[name]} regions, must be at least 1")
        return min(self._counts[name], self.options.max_count)

    def identity(self, name: str) -> int:
        """Of the name alone: no two pictures of a database have one."""
        return image_identity(f"{self.folder.name}/{name}".encode())

    def detections(self, name: str, soft_labels: bool) -> tuple[int, Detections]:
        count = self.count(name) if self._counts is not None else None
        arrays = self._arrays(name, ARRAYS if soft_labels else ARRAYS[:-1])
        return self.identity(name), select_regions(self._key(name), arrays, self.options, count)

    def _arrays(self, name: str, wanted: Iterable[str]) -> dict[str, np.ndarray]:
        value = self.store.read(name)
        if value is None:
            raise RecordFault(self._key(name), "no such picture")
        if len(value) > MAX_BYTES:
            raise RecordFault(self._key(name), f"{len(value)} bytes, the limit is {MAX_BYTES}")
        decode = read_npz if self.store.holds_npz else read_msgpack
        return decode(self._key(name), value, wanted)

    def _key(self, name: str) -> str:
        return f"{self.folder}/{name}"


class _Store(Protocol):
    """Where the regions of pictures are."""

    folder: Path
    file: str
    holds_npz: bool

    def read(self, name: str) -> bytes | None: ...


class _Lmdb:
    file = "data.mdb"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.holds_npz = folder.name.endswith("_compressed")
        read_value(folder, _KEYS)  # so that a broken one is refused now

    def read(self, name: str) -> bytes | None:
        return read_value(self.folder, name.encode())


class _NpzFiles:
    file = ""
    holds_npz = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes | None:
        """Of a file of the folder itself, whatever the name says."""
        path = self.folder / name
        if Path(name).name != name or not name.endswith(".npz") or not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)


def _open_store(folder: Path, features: str) -> _Store:
    for name in (f"{features}_compressed", features, "all_compressed", "all"):
        if (folder / name / _Lmdb.file).is_file():
            return _Lmdb(folder / name)
    if next(folder.glob("*.npz"), None) is not None:
        return _NpzFiles(folder)
    others = [path.name for path in sorted(folder.glob("feat_*"))]
    instead = f"; its {', '.join(others)} are for other limits than data.regions has" if others else ""
    raise DataError(f"{folder} has no {features}, all (or either with _compressed) and no npz files{instead}")


def read_msgpack(key: str, data: bytes, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the arrays `names` that a msgpack value holds in the form of msgpack_numpy."""
    try:
        content = msgpack.unpackb(data, raw=False, strict_map_key=False)
        return {name: _packed_array(key, name, content[name]) for name in names if name in content}
    except RecordFault:
        raise
    except Exception as error:  # msgpack raises many types on broken values
        raise RecordFault(key, f"msgpack cannot be read ({type(error).__name__}: {error})") from None


def _packed_array(key: str, name: str, packed: Mapping[bytes, Any]) -> np.ndarray:
    if packed.get(b"kind") or not isinstance(packed[b"type"], str):  # "O" is a pickle
        raise RecordFault(key, f"{name} must hold numbers, got {packed[b'type']}, which is never opened")
    return array_of(key, name, tuple(packed[b"shape"]), np.dtype(packed[b"type"]), packed[b"data"])


def read_json(path: Path, value: type) -> dict[str, Any]:
    """An object of such values."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    if not isinstance(content, dict) or not all(isinstance(one, value) for one in content.values()):
        raise DataError(f"{path} must be an object of {value.__name__}")
    return content
