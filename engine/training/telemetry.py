"""The run folder: configuration, metrics.jsonl, TensorBoard events, progress, the summary and its curves.

Everything is written by rank 0; on the other ranks every method does nothing.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich import progress as rich_progress

from engine.config import Config
from engine.training.checkpoint import Progress, write_whole
from engine.training.zero import Ranks

PACKAGES = ("torch", "triton", "deepspeed", "vlkernels")


class Telemetry:
    """What a run says about itself, from `step` on (0: a fresh run)."""

    def __init__(self, config: Config, ranks: Ranks, step: int):
        self.active = ranks.is_main
        self.device = ranks.device
        self.total_steps = config.train.total_steps
        self.folder = Path(config.folder)
        self.curves = ["loss", *config.objectives.active, "samples_per_s"]
        self.bar: rich_progress.Progress | None = None
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "config.yaml", config.to_yaml())
        self.forget_after(step)
        self.metrics = (self.folder / "metrics.jsonl").open("a", buffering=1)
        self.events = open_events(self.folder / "tensorboard", step)
        self.console = Console(stderr=False, highlight=False)
        if self.console.is_terminal:
            self.bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("starting", total=self.total_steps, completed=step)
            self.bar.start()

    def forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run will take again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [row for row in read_metrics(path) if row.get("step", 0) <= step]
            write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))

    def started(self, step: int, world: int, served: Iterable[tuple[str, str]]) -> None:
        """The environment and which implementation serves each op."""
        if self.active:
            implementations = {op: sorted({impl for o, impl in set(served) if o == op}) for op, _ in served}
            started = {"event": "start", "step": step, "implementations": implementations}
            self._write({**started, **environment(world)})

    def log(self, step: int, row: dict[str, Any]) -> None:
        """One line of metrics, the same in TensorBoard, and the progress line."""
        if not self.active:
            return
        row = {"step": step, **row, "peak_gib": round(peak_gib(self.device), 3)}
        self._write(row)
        self._events("train", step, row)
        self._progress(step, f"loss {row.get('loss', float('nan')):.4f}  {row['samples_per_s']:.0f} pairs/s")

    def _progress(self, step: int, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        else:
            print(f"step {step}/{self.total_steps}  {text}", flush=True)

    def evaluated(self, step: int, results: dict[str, Any]) -> None:
        """Results of an evaluation during or after training."""
        if self.active:
            self._write({"event": "evaluation", "step": step, **results})
            self._events("evaluation", step, flat_numbers(results))

    def say(self, line: str) -> None:
        """One line for the reader, above the progress bar."""
        if self.active:
            self.console.print(line, markup=False, soft_wrap=True)

    def warn(self, step: int, kind: str, lines: list[str]) -> None:
        """Something that went wrong without ending the run."""
        if self.active:
            self._write({"event": kind, "step": step, "lines": lines})
            for line in lines:
                self.say(f"step {step}: {kind}: {line}")

    def finished(self, progress: Progress, results: dict[str, Any]) -> None:
        """summary.json and the curves as a picture."""
        if self.active:
            self.evaluated(progress.step, results)
            speed = progress.samples_seen / max(progress.seconds, 1e-9)
            summary = {**asdict(progress), "samples_per_s": speed, "evaluation": results}
            write_whole(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
            draw_curves(read_metrics(self.folder / "metrics.jsonl"), self.curves, self.folder / "curves.png")

    def close(self) -> None:
        if self.active:
            if self.bar is not None:
                self.bar.stop()
            self.metrics.close()
            self.events.close()

    def _write(self, row: dict[str, Any]) -> None:
        self.metrics.write(json.dumps({name: finite(value) for name, value in row.items()}) + "\n")

    def _events(self, group: str, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)) and name != "step":
                self.events.add_scalar(f"{group}/{name}", value, step)


def open_events(folder: Path, step: int) -> Any:
    """A TensorBoard writer; the events of steps that will be taken again are purged."""
    from torch.utils.tensorboard import SummaryWriter  # late: it costs a second and only rank 0 writes

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def environment(world: int) -> dict[str, Any]:
    """What a reader needs to compare two runs."""
    cuda = torch.cuda.is_available()
    return {
        "processes": world,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
    }


def finite(value: Any) -> Any:
    """None for a number that JSON cannot write."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def peak_gib(device: torch.device) -> float:
    """Most memory this process has held: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def flat_numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers by their path."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flat_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{name}"] = value
    return flat


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; the last one may have been cut off by a kill."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def draw_curves(rows: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """Each of `names` over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row for row in rows if "event" not in row]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        drawn = [row for row in steps if row.get(name) is not None]
        axis.plot([row["step"] for row in drawn], [row[name] for row in drawn], linewidth=1)
        axis.set(title=name, xlabel="step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
