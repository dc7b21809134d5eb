"""Where the records of a tar shard lie: an own walk over the headers, kept in a small index file.

Only headers are read, nothing is extracted, member names are never used as paths. A damaged tar gives the
records of its readable prefix; everything else is named. The index is a line of JSON and an .npy table.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROLES = ("image", "text", "json", "regions")
_ROLE_OF_EXTENSION = {
    "jpg": "image",
    "jpeg": "image",
    "png": "image",
    "webp": "image",
    "txt": "text",
    "json": "json",
    "npz": "regions",
}
_PICKLES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "joblib"})
_BLOCK = 512
_MAX_EXTENDED_HEADER = 1 << 20
_MAX_KEY_BYTES = 200
_FORMAT = "vlkernels tar index 2"


class TarDamaged(Exception):
    """The tar cannot be read past some byte."""


class Member(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class ShardIndex:
    """`table[row]` has the fields key (bytes) and, for each of ROLES, [offset, size] (offset 0: absent)."""

    table: np.ndarray
    faults: list[str]


def tar_members(descriptor: int) -> Iterator[Member]:
    """The regular files of a tar (ustar, GNU, pax) in order; raises TarDamaged where it breaks."""
    end = os.fstat(descriptor).st_size
    offset = 0
    override: dict[str, str] = {}
    while True:
        header = os.pread(descriptor, _BLOCK, offset)
        if len(header) < _BLOCK:
            raise TarDamaged(f"truncated at byte {end}, where a header or the end mark was expected")
        if header[0] == 0 and not any(header):
            return
        kind, size = _checked_header(header, offset)
        data, size = offset + _BLOCK, int(override.get("size", size))
        name = override.get("path") or _header_name(header)
        if size < 0 or data + size > end:
            raise TarDamaged(
                f"truncated inside {name[:_MAX_KEY_BYTES]!r}: it ends at {data + size}, the file at {end}"
            )
        if kind in (b"x", b"L"):
            override |= _extended_header(kind, _read_extended(descriptor, data, size))
        elif kind != b"K":  # a long link name describes the same following member as what was read before it
            if kind in (b"0", b"\0", b"7"):
                yield Member(name, data, size)
            override = {}
        offset = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _checked_header(header: bytes, offset: int) -> tuple[bytes, int]:
    """(type flag, size) of a header whose checksum holds."""
    try:
        expected = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if _number(header[148:156]) != expected:
            raise ValueError
        return header[156:157], _number(header[124:136])
    except ValueError:
        raise TarDamaged(f"no valid tar header at byte {offset}") from None


def _number(field: bytes) -> int:
    if field[0] == 0x80:  # GNU: big-endian binary for what octal digits cannot hold
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if digits and not digits.isdigit():
        raise ValueError
    return int(digits or b"0", 8)


def _header_name(header: bytes) -> str:
    name, prefix = (
        part.split(b"\0", 1)[0].decode("utf-8", "replace") for part in (header[:100], header[345:500])
    )
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _read_extended(descriptor: int, offset: int, size: int) -> bytes:
    if size > _MAX_EXTENDED_HEADER:
        raise TarDamaged(
            f"extended header of {size} bytes at byte {offset}, the limit is {_MAX_EXTENDED_HEADER}"
        )
    return os.pread(descriptor, size, offset)


def _extended_header(kind: bytes, data: bytes) -> dict[str, str]:
    """The path and size that a GNU long name or a pax header gives to the next member."""
    if kind == b"L":
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "replace")}
    found: dict[str, str] = {}
    while data and data[0]:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise TarDamaged("a pax header has a record of wrong length")
        key, _, value = rest[: int(length) - len(length) - 1].rstrip(b"\n").partition(b"=")
        if key == b"path" or (key == b"size" and value.isdigit()):
            found[key.decode()] = value.decode("utf-8", "replace")
        data = data[int(length) :]
    return found


def build_index(shard: Path) -> ShardIndex:
    """Groups the members of a shard into records by key: the name up to the first dot of its last part."""
    records: dict[str, dict[str, tuple[int, int]]] = {}
    faults: list[str] = []
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        for member in tar_members(descriptor):
            _sort_in(member, shard, records, faults)
    except TarDamaged as damage:
        faults.append(f"{shard}: {damage}")
    finally:
        os.close(descriptor)
    usable = {}
    for key, roles in records.items():
        if missing := _missing(roles):
            faults.append(f"{shard}/{key}: {missing}")
        else:
            usable[key] = roles
    return ShardIndex(_as_table(usable), faults)


def _sort_in(
    member: Member, shard: Path, records: dict[str, dict[str, tuple[int, int]]], faults: list[str]
) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, _, extension = base.lower().partition(".")
    key = f"{folder}/{base[: len(stem)]}" if folder else base[: len(stem)]
    if _PICKLES.intersection(extension.split(".")):
        faults.append(f"{shard}/{member.name}: a pickle, never opened")
    elif extension in _ROLE_OF_EXTENSION:
        role = _ROLE_OF_EXTENSION[extension]
        if role in records.setdefault(key, {}):
            faults.append(f"{shard}/{member.name}: a second {role} of record {key}, the first is used")
        else:
            records[key][role] = (member.offset, member.size)


def _missing(roles: dict[str, tuple[int, int]]) -> str | None:
    if "image" not in roles and "regions" not in roles:
        return "no image"
    return None if "text" in roles or "json" in roles else "no caption"


def _as_table(records: dict[str, dict[str, tuple[int, int]]]) -> np.ndarray:
    keys = [key.encode()[:_MAX_KEY_BYTES] for key in records]
    fields = [("key", f"S{max(map(len, keys), default=1) or 1}"), *((role, "<i8", (2,)) for role in ROLES)]
    table = np.zeros(len(keys), dtype=fields)
    table["key"] = keys
    for role in ROLES:
        table[role] = [roles.get(role, (0, 0)) for roles in records.values()] or np.zeros((0, 2))
    return table


def load_index(shard: Path, cache: Path) -> ShardIndex:
    """The stored index of a shard if it still describes the file, else a new one, stored atomically."""
    state = os.stat(shard)
    header = {"format": _FORMAT, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    digest = hashlib.blake2b(os.fsencode(shard.resolve()), digest_size=8).hexdigest()
    path = cache / "indices" / f"{shard.stem}-{digest}.index"
    if stored := _read_index(path, header):
        return stored
    index = build_index(shard)
    _write_index(path, header, index)
    return index


def _read_index(path: Path, expected: dict[str, str | int]) -> ShardIndex | None:
    """None when there is no index, it describes another state of the shard, or it is damaged."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            faults = [str(fault) for fault in header.pop("faults")]
            if header != expected:
                return None
            table = np.lib.format.read_array(file, allow_pickle=False)
        return ShardIndex(table, faults) if table.dtype.names == ("key", *ROLES) and table.ndim == 1 else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _write_index(path: Path, header: dict[str, str | int], index: ShardIndex) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(json.dumps({**header, "faults": index.faults}).encode() + b"\n")
        np.lib.format.write_array(file, index.table, allow_pickle=False)
    os.replace(file.name, path)
