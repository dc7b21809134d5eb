"""Every recipe trained at a small size on built-in data, each loss on held-out samples beside what can be had blindly.

    python -m benchmarks.systems [NAME ...] [--missing] [--output runs/systems]

benchmarks/small_systems.yaml has what each run differs in from its recipe. Results go to
benchmarks/results/<machine>/systems.jsonl and, the newest of each run, to the table of docs/SYSTEMS.md. A run that this
very commit has stored is not repeated, so that one that was cut off goes on where it was; a run that fails is told at
the end, and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.provenance import RESULTS, ROOT, provenance, store
from engine.recipes import table

SETTINGS = ROOT / "benchmarks" / "small_systems.yaml"
PAGE = ROOT / "docs" / "SYSTEMS.md"
SIZES = {"width": 64, "layers": 2, "heads": 4, "mlp_width": 256}
ROLES = ("image", "text", "fusion", "joint", "decoder", "generator")

Settings = dict[str, Any]
Row = dict[str, Any]


def described(path: Path) -> tuple[Settings, dict[str, Settings]]:
    """What all runs share, and the own settings of each run: one of every recipe, and those that are listed besides."""
    listed = yaml.safe_load(path.read_text())
    shared = listed.pop("all")
    return shared, {name: listed.get(name) or {} for name in sorted({*table.names(), *listed})}


def small(name: str, shared: Settings, own: Settings) -> Settings:
    """A recipe with its tiny data, wide and long enough to learn from them in minutes."""
    own = dict(own)
    published = table.recipe(own.pop("recipe", name))
    run = dataclasses.replace(published, tiny=True).as_dict()
    for role in ROLES:
        if (stack := run["model"][role]) is not None:
            stack |= {size: min(value, getattr(getattr(published.model, role), size)) for size, value in SIZES.items()}
    bucketed = run["train"]["buckets"] is not None
    settings = {**shared, **({"train.global_batch": run["train"]["global_batch"]} if bucketed else {}), **own}
    settings.setdefault("schedule.warmup_steps", settings["train.max_steps"] // 20)
    for path, value in {"name": name, **settings}.items():
        *sections, last = path.split(".")
        section = functools.reduce(lambda inner, part: inner[part], sections, run)
        if last not in section:
            raise ValueError(f"{SETTINGS.name}: {name} has no setting {path}")
        section[last] = value
    return json.loads(json.dumps(run))  # lists for tuples


def digest(name: str, shared: Settings, listed: dict[str, Settings]) -> str:
    """Names what a run is written as: its recipe, what differs, and the runs it begins with. An option that the engine gained
    since, and that nobody has set, makes no other run of it."""
    own = listed[name]
    recipe = yaml.safe_load((table.FOLDER / f"{own.get('recipe', name)}.yaml").read_text())
    before = [digest(other, shared, listed) for other in own.get("init_from", {}).values()]
    written = json.dumps([recipe, SIZES, shared, own, before], sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def train(run: Settings, output: Path) -> dict[str, Any]:
    """The summary of a run in a process of its own. `init_from` names runs, whose weights it begins with."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{run['name']}.yaml"
    begun = {part: str(finished(other, part, output)) for part, other in run["init_from"].items()}
    file.write_text(yaml.safe_dump({**run, "output": str(output), "init_from": begun}, sort_keys=False))
    command = [sys.executable, str(ROOT / "engine/pretrain.py"), "--config", str(file), "--train.resume", "never"]
    subprocess.run(command, check=True)
    return json.loads((output / run["name"] / "summary.json").read_text())


def finished(name: str, part: str, output: Path) -> Path:
    """The weights of a run; a teacher's as `transformers` saves them. It is trained anew: those of an older commit would
    tell lies."""
    shared, listed = described(SETTINGS)
    train(small(name, shared, listed[name]), output)
    if part != "teacher":
        return output / name
    folder = output / f"{name}-published"
    subprocess.run([sys.executable, "-m", "engine.export", str(output / name), str(folder)], check=True)
    return folder


@dataclasses.dataclass
class Clock:
    """Seconds since some moment, and those that cores have worked for the processes started here, since another."""

    seconds: float = dataclasses.field(default_factory=time.monotonic)
    core_seconds: float = dataclasses.field(default_factory=lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]))

    def since(self, begun: Clock) -> dict[str, float]:
        return {name: round(value - getattr(begun, name), 1) for name, value in vars(self).items()}


def row_of(run: Settings, settings: str, summary: dict[str, Any], taken: dict[str, float]) -> Row:
    """What is stored of a run."""
    return {
        "op": "systems",
        "benchmark": run["name"],
        "dtype": "float32",
        "settings": settings,
        "steps": run["train"]["max_steps"],
        "lr": run["optimizer"]["lr"],
        **taken,
        "samples": summary["samples_seen"],
        "evaluation": summary["evaluation"],
    }


def beside_blind(evaluation: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    """(objective, loss, what is known blindly, its loss) of every figure of an evaluation that has such a companion."""
    for group, figures in evaluation.items():
        if isinstance(figures, dict) and "loss" in figures:
            for name, value in figures.items():
                if name.startswith("loss_"):
                    yield group, figures["loss"], name.removeprefix("loss_").replace("_", " "), value


def told(rows: Sequence[Row]) -> str:
    """The page: the newest row of each run, runs in their order."""
    newest = {row["benchmark"]: row for row in rows}
    lines = [
        "# Systems",
        "",
        "Each recipe at a small size (two layers of width 64), trained on built-in data for the steps named; losses on",
        "held-out samples beside what can be had without looking at what the loss is about. Written by `make systems`;",
        "`benchmarks/small_systems.yaml` says what differs from the recipes. What each recipe is made of, and its parameters",
        "at the published size: `python -m engine.recipes`.",
        "",
        "| run | steps | rate | core seconds | loss | held out | blindly | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(newest):
        row = newest[name]
        begin = f"`{name}` | {row['steps']:,} | {row['lr']:.2g} | {row['core_seconds']:.0f}"
        for group, loss, what, blind in beside_blind(row["evaluation"]):
            shown, beside = f"{loss:.4g}", f"{blind:.4g}"
            verdict = "" if float(shown) < float(beside) else "**not below**"
            lines.append(f"| {begin} | {group} | {shown} | {beside} ({what}) | {verdict} |")
            begin = " | | | "
    return "\n".join(lines) + "\n"


def stored_rows(results: Path = RESULTS) -> list[Row]:
    """All that was stored on any machine, the oldest first."""
    rows = [json.loads(line) for path in results.glob("*/systems.jsonl") for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["date"])


def is_stored(name: str, settings: str, rows: Sequence[Row], any_commit: bool) -> bool:
    """Whether there is a row of these very settings, by this very commit or by any."""
    here = provenance("cpu")
    return any(
        (row["benchmark"], row["settings"]) == (name, settings)
        and (any_commit or (row["commit"] == here["commit"] and not row["modified"] and not here["modified"]))
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="runs (all)")
    parser.add_argument("--missing", action="store_true", help="only runs whose settings have no row of any commit")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "systems")
    options = parser.parse_args(arguments)
    shared, listed = described(SETTINGS)
    if unknown := sorted(set(options.names) - listed.keys()):
        parser.error(f"no run {', '.join(unknown)}")
    failed = []
    for name in options.names or listed:
        run, settings = small(name, shared, listed[name]), digest(name, shared, listed)
        if is_stored(name, settings, stored_rows(), options.missing):
            print(f"{name}: stored", flush=True)
            continue
        begun = Clock()
        try:
            summary = train(run, options.output)
        except subprocess.CalledProcessError:
            failed.append(name)
            continue
        store("systems", row_of(run, settings, summary, Clock().since(begun)), "cpu")
    PAGE.write_text(told(stored_rows()))
    if failed:
        print(f"systems: no row of {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
