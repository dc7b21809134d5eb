"""A run that is killed ten times, again and again while it saves, ends as if nothing had happened."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launch import ROOT, finish, start
from shared_cache import shared_cache

from engine.training.command_line import parse
from engine.training.telemetry import read_metrics

WORKER = Path(__file__).with_name("forked_runs.py")
RECIPE = ROOT / "engine" / "recipes" / "uniter_base.yaml"
STEPS, SEED = 24, 5
__all__ = ["shared_cache"]
IN_A_SAVE = ("step_*", "step_*/*model_states.pt", "step_*/*optim_states.pt", "step_*/rank_0.pt")
"""What a save makes, in this order; the manifest is its end."""


class Runs:
    """Begins a run in a process of its own, and sees its end."""

    def __init__(self, server: subprocess.Popen, folder: Path, argv: list[str]):
        self.server, self.argv, self.log = server, argv, str(folder / "log")

    def begin(self, name: str) -> int:
        order = {"argv": [*self.argv, f"--name={name}"], "log": self.log}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def exit_code(self) -> int:
        return int(self.server.stdout.readline())


@pytest.fixture
def runs(tmp_path, shared_cache) -> Iterator[Runs]:
    where = ["--device=cpu", f"--output={tmp_path}", f"--data.cache={shared_cache}", "--train.save_every=2"]
    small = ["--tiny=true", "--data.max_records=64", "--evaluation.gallery=16", "--train.log_every=1"]
    config = parse(["--config", str(RECIPE), *small, *where])
    config.tiny, config.train.max_steps = False, STEPS  # tiny runs end sooner
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    (server,) = start([WORKER], stdin=subprocess.PIPE)
    try:
        assert server.stdout.readline() == "ready\n", server.stderr.read()
        yield Runs(server, tmp_path, ["--config", str(tmp_path / "run.yaml")])
    finally:
        server.stdin.close()
        server.stdin = None  # or `communicate` would flush it
        finish([server], timeout=5)


def kill_when(runs: Runs, moment: Callable[[], bool], delay: float) -> None:
    """One life: the same command, ended by kill -9 a little after the moment."""
    process = runs.begin("killed")
    deadline = time.monotonic() + 60
    while not moment():
        alive = time.monotonic() < deadline and Path(f"/proc/{process}").exists()
        assert alive, Path(runs.log).read_text()[-3000:]
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    assert runs.exit_code() == -signal.SIGKILL


def logged(folder: Path, steps: int) -> Callable[[], bool]:
    """Whether a run that begins now has logged so many steps beyond its last checkpoint."""
    whole = folder.glob("checkpoints/step_*/manifest.json")
    saved = max((int(path.parent.name.removeprefix("step_")) for path in whole), default=0)
    began, metrics = time.time(), folder / "metrics.jsonl"

    def moment() -> bool:
        if not metrics.exists() or metrics.stat().st_mtime < began:
            return False
        return max((row.get("step", 0) for row in read_metrics(metrics)), default=0) >= saved + steps

    return moment


def saving(folder: Path, pattern: str) -> Callable[[], bool]:
    """Whether a run that begins now has made such a file of a checkpoint."""
    began = time.time()

    def moment() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_mtime > began for path in (folder / "checkpoints").glob(pattern))
        return False

    return moment


def unfinished(folder: Path) -> int:
    """Checkpoints without a manifest."""
    return sum(not (path / "manifest.json").exists() for path in (folder / "checkpoints").glob("step_*"))


def test_a_run_killed_ten_times_has_the_curve_of_one_that_was_not(tmp_path, runs):
    """UNITER's tasks, sets and buckets in bf16 under ZeRO-1: every line of its metrics, and its weights."""
    runs.begin("straight")
    folder, draw = tmp_path / "killed", random.Random(SEED)
    kinds = draw.sample(["starting"] * 2 + ["stepping"] * 4 + ["saving"] * 4, 10)
    assert runs.exit_code() == 0, Path(runs.log).read_text()[-3000:]
    cut = 0
    for kind in kinds:
        if kind == "starting":
            kill_when(runs, lambda: True, draw.uniform(0, 1.5))
        elif kind == "stepping":
            kill_when(runs, logged(folder, draw.randint(1, 3)), draw.uniform(0, 0.1))
        else:
            kill_when(runs, saving(folder, draw.choice(IN_A_SAVE)), draw.uniform(0, 0.01))
            cut += unfinished(folder) > 0
    assert cut >= 2
    runs.begin("killed")
    assert runs.exit_code() == 0, Path(runs.log).read_text()[-3000:]

    straight, killed = (curve(tmp_path / name) for name in ("straight", "killed"))
    assert [row["step"] for row in straight] == list(range(1, STEPS + 1))
    assert killed == straight
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert weights[0] == weights[1]


def curve(folder: Path) -> list[dict]:
    """The lines of the metrics without what is measured rather than computed."""
    measured = ("samples_per_s", "tokens_per_s", "peak_gib")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "event" not in row]
    return [{name: value for name, value in row.items() if name not in measured} for row in rows]
