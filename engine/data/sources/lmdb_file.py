"""Values of an LMDB environment, read only."""

from functools import lru_cache
from pathlib import Path

import lmdb

from engine.data.records.record import DataError

_MAX_KEY_BYTES = 511


@lru_cache(maxsize=None)
def open_lmdb(folder: Path) -> lmdb.Environment:
    """The environment in a folder; one per process, as the library demands.

    Without lock file and reader table it is a mapping of a file that nobody writes, which forks share.
    """
    try:
        environment = lmdb.open(str(folder), readonly=True, lock=False, create=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"{folder} is no LMDB that can be read ({error})") from None
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = (folder / "data.mdb").stat().st_size
    if size < needed:  # reading past the end would kill the process
        raise DataError(f"{folder}/data.mdb is truncated: {size} of {needed} bytes")
    return environment


def read_value(folder: Path, key: bytes) -> bytes | None:
    """The value, or None where there is none."""
    if not 0 < len(key) <= _MAX_KEY_BYTES:
        return None
    with open_lmdb(folder).begin() as transaction:
        return transaction.get(key)
