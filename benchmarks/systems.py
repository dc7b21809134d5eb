"""Every recipe trained at a small size on built-in data, each loss on held-out samples beside what can be had blindly.

    python -m benchmarks.systems [NAME ...] [--steps 1000] [--output runs/systems]

Results go to benchmarks/results/<machine>/systems.jsonl and, the newest of each recipe, to the table of docs/SYSTEMS.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.provenance import RESULTS, ROOT, store
from engine.recipes.table import names, recipe

PAGE = ROOT / "docs" / "SYSTEMS.md"
SIZES = {"width": 64, "layers": 2, "heads": 4, "mlp_width": 256}
ROLES = ("image", "text", "fusion", "joint", "decoder", "generator")

Figures = dict[str, float]


def small(name: str, steps: int, output: Path) -> dict[str, Any]:
    """A recipe with its tiny data, wide and long enough to learn from them in minutes."""
    run = recipe(name, "--tiny=true").as_dict()
    for role in ROLES:
        if (stack := run["model"][role]) is not None:
            published = recipe(name).as_dict()["model"][role]
            stack |= {size: min(value, published[size]) for size, value in SIZES.items()}
    run |= {"tiny": False, "output": str(output), "precision": "fp32"}
    run["data"] |= {"max_records": 4096}
    run["train"] |= {"max_steps": steps, "save_every": 0, "log_every": 50}
    if run["train"]["buckets"] is None:
        run["train"] |= {"global_batch": 32}
    run["optimizer"] |= {"lr": 2e-3, "clip": 1.0}
    run["schedule"] |= {"warmup_steps": steps // 20}
    run["evaluation"] |= {"gallery": 256}
    return run


def train(name: str, steps: int, output: Path) -> dict[str, Any]:
    """The summary of a run in a process of its own."""
    output.mkdir(parents=True, exist_ok=True)
    described = output / f"{name}.yaml"
    described.write_text(yaml.safe_dump(json.loads(json.dumps(small(name, steps, output))), sort_keys=False))
    command = [sys.executable, str(ROOT / "engine/pretrain.py"), "--config", str(described), "--train.resume", "never"]
    subprocess.run(command, check=True)
    return json.loads((output / name / "summary.json").read_text())


def beside_blind(evaluation: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    """(objective, loss, what is known blindly, its loss) of every figure of an evaluation that has such a companion."""
    for group, figures in evaluation.items():
        if isinstance(figures, dict) and "loss" in figures:
            for name, value in figures.items():
                if name.startswith("loss_"):
                    yield group, figures["loss"], name.removeprefix("loss_").replace("_", " "), value


def told(rows: Sequence[dict[str, Any]]) -> str:
    """The page: the newest row of each recipe, recipes in their order."""
    newest = {row["benchmark"]: row for row in rows}
    lines = [
        "# Systems",
        "",
        "Each recipe at a small size (two layers of width 64), trained on built-in data for the steps named; losses on held-out",
        "samples beside what can be had without looking at what the loss is about. Written by `make systems`; what each recipe is",
        "made of, and its parameters at the published size: `python -m engine.recipes`.",
        "",
        "| recipe | steps | loss | held out | blindly | |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(newest):
        row = newest[name]
        for place, (group, loss, what, blind) in enumerate(beside_blind(row["evaluation"])):
            begin = (f"`{name}`", f"{row['steps']:,}") if place == 0 else ("", "")
            verdict = "" if loss < blind else "**not below**"
            lines.append(f"| {begin[0]} | {begin[1]} | {group} | {loss:.4g} | {blind:.4g} ({what}) | {verdict} |")
    return "\n".join(lines) + "\n"


def stored_rows(results: Path = RESULTS) -> list[dict[str, Any]]:
    """All that was stored on any machine, the oldest first."""
    rows = [json.loads(line) for path in results.glob("*/systems.jsonl") for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["date"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes (all)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "systems")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"no recipe {', '.join(unknown)}")
    for name in options.names or names():
        summary = train(name, options.steps, options.output)
        row = {"op": "systems", "benchmark": name, "dtype": "float32", "steps": options.steps}
        store("systems", {**row, "evaluation": summary["evaluation"], "samples": summary["samples_seen"]}, "cpu")
        PAGE.write_text(told(stored_rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
