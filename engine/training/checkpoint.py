"""Checkpoints that are either whole or ignored.

A checkpoint is a folder `step_00000100`: DeepSpeed's shards, one file per rank of random states and averages, and last a
manifest with the size and digest of every file. `latest` is replaced in one step after that. A process killed
at any moment leaves a folder without a manifest, or one that does not verify: the one before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import vlkernels as vk

from engine.config import Config
from engine.training.generators import generator_states, restore_generators
from engine.training.zero import Engine, Ranks

MANIFEST = "manifest.json"
RESTORED = ("kind", "betas", "eps", "weight_decay", "momentum", "lr_multipliers", "freeze")


@dataclass
class Progress:
    """Where a run stands. The stream goes on from `step` and `samples_seen`, the pairs of all steps."""

    step: int = 0
    samples_seen: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    faults: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole, and of a run like this one."""

    path: Path
    progress: Progress


class Checkpoints:
    """The checkpoints of one run folder; every method is called on every rank."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path):
        self.ranks, self.folder, self.keep = ranks, folder, config.train.keep_checkpoints
        self.identity = identity(config, ranks.world)

    def save(self, engine: Engine, rng: vk.Rng, progress: Progress) -> None:
        """Write a checkpoint, make it the latest, drop the oldest."""
        tag = f"step_{progress.step:08d}"
        target = self.folder / tag
        if self.ranks.is_main:
            shutil.rmtree(target, ignore_errors=True)  # what a killed process left
            target.mkdir(parents=True)
        self.ranks.barrier()
        engine.save(str(self.folder), tag)
        own = {**random_state(self.ranks, rng), "averages": engine.averages.masters}
        torch.save(own, target / f"rank_{self.ranks.rank}.pt")
        self.ranks.barrier()
        files = self._describe(target)
        if self.ranks.is_main:
            manifest = {"progress": asdict(progress), "identity": self.identity, "files": files}
            write_whole(target / MANIFEST, json.dumps(manifest, indent=1))
            write_whole(self.folder / "latest", tag)
            for old in [path for path in self._folders() if path.name <= tag][self.keep :]:
                shutil.rmtree(old)
        self.ranks.barrier()

    def newest(self, folder: Path | None = None) -> Checkpoint | None:
        """The newest whose files are all as its manifest says, of this run or in another's folder."""
        for path in self._folders(folder):
            manifest = read_manifest(path)
            if manifest is not None and self._describe(path) == manifest["files"]:
                refuse_differences(path, manifest["identity"], self.identity)
                return Checkpoint(path, Progress(**manifest["progress"]))
        return None

    def load(self, checkpoint: Checkpoint, engine: Engine, rng: vk.Rng) -> Progress:
        """Restore what `newest` found."""
        path = checkpoint.path
        state = torch.load(path / f"rank_{self.ranks.rank}.pt", map_location="cpu", weights_only=True)
        refuse_missing(path, state)
        engine.load(str(path.parent), path.name)
        restore_random_state(state, self.ranks, rng)
        engine.averages.masters = [[piece.to(self.ranks.device) for piece in part] for part in state["averages"]]
        return checkpoint.progress

    def _folders(self, folder: Path | None = None) -> list[Path]:
        """Newest first."""
        return sorted((folder or self.folder).glob("step_????????"), reverse=True)

    def _describe(self, path: Path) -> dict[str, dict[str, Any]]:
        """Size and digest of every file, read by the ranks together; each is on disk when this returns."""
        files = [p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST]
        names = sorted(str(p.relative_to(path)) for p in files)
        mine = {name: describe_file(path / name) for name in names[self.ranks.rank :: self.ranks.world]}
        described = {name: entry for part in self.ranks.gather(mine) for name, entry in part.items()}
        return dict(sorted(described.items()))


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, flushed to the disk first."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a crash, sees the old text or the new."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def identity(config: Config, world: int) -> dict[str, Any]:
    """What a checkpoint and the run that loads it must share."""
    model = config.as_dict()["model"]
    towers = [(name, tower) for name, tower in model.items() if isinstance(tower, dict)]
    shared = {
        **{f"model.{tower}.{name}": value for tower, options in towers for name, value in options.items()},
        "model.projection_dim": config.model.projection_dim,
        "objectives": list(config.objectives.active),
        # a checkpoint brings its own: DeepSpeed restores the groups of parameters with all they hold
        **{f"optimizer.{name}": getattr(config.optimizer, name) for name in RESTORED},
        "optimizer.rules": {prefix: asdict(rule) for prefix, rule in config.optimizer.rules.items()},
        "precision": config.precision,
        "zero.stage": config.zero.stage,
        "the number of processes": world,
        **plan_by_step(config),
    }
    return json.loads(json.dumps(shared))  # tuples become lists, as in the manifest


def plan_by_step(config: Config) -> dict[str, Any]:
    """What else decides which batches a step takes, where it draws its set, takes bucketed batches or mixes."""
    data, train = config.data, config.train
    if data.sets is None and train.buckets is None and data.texts is None:
        return {"data.sets": None, "train.buckets": None, "data.texts": None}
    return {
        "data.sets": {name: one.tasks for name, one in (data.sets or {}).items()},
        "the order of tasks": [f"{name} {task}" for name, one in (data.sets or {}).items() for task in one.tasks],
        "data.regions": data.regions and asdict(data.regions),
        "data.max_caption_tokens": data.max_caption_tokens,
        "train.buckets": train.buckets and asdict(train.buckets),
        "data.texts": data.texts and asdict(data.texts),
        "train.global_batch": train.global_batch,
        "seed": config.seed,
    }


def refuse_differences(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Say in one line what differs; DeepSpeed itself would fail in a traceback."""
    changed = [name for name, value in current.items() if saved.get(name) != value]
    if changed:
        differences = "; ".join(f"{name} was {saved.get(name)} and is {current[name]}" for name in changed)
        anew = "give the run another --name, or begin it anew with --train.resume never"
        raise ValueError(f"cannot resume from {path}: {differences}; {anew}")


def refuse_missing(path: Path, state: dict[str, Any]) -> None:
    """One line about a checkpoint of an earlier version."""
    if "averages" not in state:
        raise ValueError(f"cannot resume from {path}: it was written before checkpoints had momentum copies, begin a new run")


def random_state(ranks: Ranks, rng: vk.Rng) -> dict[str, Any]:
    return {**generator_states(ranks.device), "model": rng.state_dict()}


def restore_random_state(state: dict[str, Any], ranks: Ranks, rng: vk.Rng) -> None:
    restore_generators(state, ranks.device)
    rng.load_state_dict(state["model"])
