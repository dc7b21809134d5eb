"""Where a run lives, and what it goes on from."""

from __future__ import annotations

from pathlib import Path

from engine.config import Config
from engine.training.zero import Ranks

CHECKPOINTS = "checkpoints"


def open_run(config: Config, ranks: Ranks) -> Path:
    """Make the run's folder; returns the one whose newest checkpoint, if any, the run goes on from."""

    def open_once() -> Path:
        own = Path(config.folder)
        if config.train.resume == "never" and ranks.is_main and own.exists():
            own.rename(unused_name(own))
        own.mkdir(parents=True, exist_ok=True)
        if config.train.resume in ("auto", "never") or has_checkpoint(own):
            return own
        other = Path(config.train.resume)
        if not has_checkpoint(other):
            raise ValueError(f"train.resume: {other} holds no checkpoint; auto, never or a run folder")
        return other

    return ranks.main_first(open_once)


def has_checkpoint(folder: Path) -> bool:
    """Whether something was saved under this run folder (whole or not)."""
    return any((folder / CHECKPOINTS).glob("step_*/manifest.json"))


def unused_name(folder: Path) -> Path:
    """folder.1, folder.2, ...: the first that is free."""
    number = 1
    while (candidate := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return candidate
