"""Where a run lives, and what it goes on from."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import uuid
from pathlib import Path
from typing import TextIO

from engine.config import Config
from engine.sections import require
from engine.training.zero import Ranks

CHECKPOINTS = "checkpoints"
IN_USE = ".in_use"
SHARED_AFTER = 5.0  # seconds a network file system may take to show a new file on the other hosts


def open_run(config: Config, ranks: Ranks) -> Path:
    """Make the run's folder; returns the one whose newest checkpoint, if any, the run goes on from."""
    own = Path(config.folder)

    def make() -> None:
        if ranks.is_main:
            if config.train.resume == "never" and own.exists():
                hold(own)
                own.rename(unused_name(own))
            own.mkdir(parents=True, exist_ok=True)
            hold(own)

    def choose() -> Path:
        if config.train.resume in ("auto", "never") or has_checkpoint(own):
            return own
        other = Path(config.train.resume)
        if not has_checkpoint(other):
            raise ValueError(f"train.resume: {other} holds no checkpoint; auto, never or a run folder")
        return other

    ranks.main_first(make)
    require_shared(own, ranks)
    return ranks.main_first(choose)


_held: dict[tuple[int, int], TextIO] = {}


def hold(folder: Path) -> None:
    """Refuse a folder that another process holds; else nobody else can hold it while this process lives."""
    path = folder / IN_USE
    path.touch()
    identity = path.stat().st_dev, path.stat().st_ino
    if identity in _held:  # to open and close the file once more would let it go
        return
    file = path.open("r+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder} is in use by {file.read()}: wait for it, or take another name or output") from None
    except OSError:  # a file system without locks
        return
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[identity] = file


def require_shared(folder: Path, ranks: Ranks) -> None:
    """One line when a host does not see the folder that rank 0 made: shards and tokenizer pass through it."""
    probe = folder / ranks.gather(f".{uuid.uuid4().hex}")[0]  # a new name: no host has it in a cache
    ranks.main_first(lambda: probe.touch() if ranks.is_main else None)
    blind = None if appears(probe, SHARED_AFTER) else f"rank {ranks.rank} on {socket.gethostname()}"
    blind = [rank for rank in ranks.gather(blind) if rank is not None]
    if ranks.is_main:
        probe.unlink()
    require(
        not blind,
        f"the run folder {folder} that rank 0 made is not there for {', '.join(blind)}: output must name a "
        "folder that all hosts share",
    )


def appears(path: Path, seconds: float) -> bool:
    """Whether a file is there within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def has_checkpoint(folder: Path) -> bool:
    """Whether something was saved under this run folder (whole or not)."""
    return any((folder / CHECKPOINTS).glob("step_*/manifest.json"))


def unused_name(folder: Path) -> Path:
    """folder.1, folder.2, ...: the first that is free."""
    number = 1
    while (candidate := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return candidate
