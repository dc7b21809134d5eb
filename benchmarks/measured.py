"""The rows of benchmarks/results as the report reads them: with their provenance, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import provenance

LATEST = 3  # runs of a line that are shown
Amounts = Callable[[Mapping[str, Any]], Mapping[str, float]]
"""What a row says each variant takes, by the variant's name."""


class Refused(ValueError):
    """A row or a line of the report that must not be shown; the message says in one line which, and why."""


class Machine(NamedTuple):
    folder: str
    device: str
    arch: str
    threads: int | None

    def __str__(self) -> str:
        return ", ".join([self.device, self.arch, *([f"{self.threads} threads"] if self.threads else [])])


@dataclass(frozen=True)
class Row:
    path: Path
    number: int
    values: Mapping[str, Any]

    @property
    def machine(self) -> Machine:
        return Machine(self.path.parent.name, self.values["device"], self.values["arch"], self.values.get("threads"))

    @property
    def is_clean(self) -> bool:
        return self.values["modified"] is False

    @property
    def heap(self) -> str:
        """Of a CPU: whether freed memory stayed with the process; earlier rows all kept most of it."""
        return self.values.get("heap") or "kept"

    def is_of(self, file: str, benchmark: str, dtype: str) -> bool:
        """A whole step has one row, without a dtype."""
        names = self.path.stem, self.values.get("benchmark")
        return names == (file, benchmark) and self.values.get("dtype") in (None, f"torch.{dtype}")


class Figure(NamedTuple):
    """How many times as much the best of the peers takes as we do, and the row that says so."""

    times: float
    row: Row


def seconds(values: Mapping[str, Any]) -> Mapping[str, float]:
    return {variant: timing["median"] for variant, timing in values.get("seconds", {}).items()}


def peak_bytes(values: Mapping[str, Any]) -> Mapping[str, float]:
    return {variant: peak for variant, peak in (values.get("peak_bytes") or {}).items() if peak}


def share_of_floor(values: Mapping[str, Any]) -> float | None:
    """The least time of forward and backward by what the device did in the same run, over ours; ``None``: it is not known."""
    roof, cost = values.get("roof"), values.get("cost")
    if not roof or not cost:
        return None
    parts = ("forward", "backward")
    least = sum(max(cost[f"{part}_flops"] / roof["flops"], cost[f"{part}_bytes"] / roof["bytes"]) for part in parts)
    return least / seconds(values)["vlkernels"]


def packed_step(values: Mapping[str, Any]) -> Mapping[str, float]:
    """Of the whole step, which keeps what plain ones take in packed steps; earlier rows named them by their task."""
    found = {name.replace("mlm,", "padded PyTorch,"): times for name, times in values.get("packed_times_as_fast", {}).items()}
    return {"packed": 1.0, **found}


def read(results: Path) -> list[Row]:
    """Oldest first, without those that do not say what code they timed and are older than the digest that does."""
    paths = [path for path in sorted(results.glob("*/*.jsonl")) if path.parent.name != "static"]
    return sorted((row for path in paths for row in _rows_of(path, results)), key=lambda row: row.values["date"])


def _rows_of(path: Path, results: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path.relative_to(results)}:{number}"
        try:
            values = dict(json.loads(line))
        except (TypeError, ValueError):
            raise Refused(f"{where}: not an object of JSON") from None
        lacking = provenance.lacking(values, on_card=not path.parent.name.startswith("cpu-"))
        if lacking:
            raise Refused(f"{where}: not shown, its provenance has no {', no '.join(lacking)}")
        if provenance.names_its_code(values):
            yield Row(path, number, values)


def figures(rows: list[Row], amounts: Amounts, ours: str, peers: tuple[str, ...]) -> list[Figure]:
    """Of the latest rows in which all of these ran, latest first."""
    found = []
    for row in reversed(rows):
        taken = amounts(row.values)
        if {ours, *peers} <= taken.keys():
            found.append(Figure(min(taken[peer] for peer in peers) / taken[ours], row))
    return found[:LATEST]
