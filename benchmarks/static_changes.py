"""What changed between two static reports of an op: told when `make static` writes the new one, so that a review sees it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import offline

Row = Mapping[str, Any]
# Of these less is better, of the last two more.
AMOUNTS: dict[str, Callable[[Row], float]] = {
    "registers": lambda row: row["registers"],
    "bytes of stack": lambda row: row["stack_bytes"],
    "local accesses": offline.local_memory_accesses,
    "bytes of shared memory": lambda row: row["shared_bytes"],
    "instructions": lambda row: row["instructions"],
    "tensor-core instructions": lambda row: -offline.tensor_core_instructions(row),
    "programs per multiprocessor": lambda row: -row["programs_per_sm"],
}
# What a kernel was compiled from and to; what is left of a row says which kernel it is.
OUTCOME = ("constants", "num_warps", "num_stages", "triton", "identity", *offline.MEASURED)


def told(op: str, before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """One line for each kernel that got worse, appeared or vanished, and how many others there are."""
    old, new = _by_kernel(before), _by_kernel(after)
    lines, better, equal = [], 0, 0
    for name in sorted({*old, *new}):
        here, there = old.get(name, []), new.get(name, [])
        for first, then in zip(here, there):
            worse = list(regressions(first, then))
            lines += [f"{op} WORSE: {name}: {', '.join(worse)}"] if worse else []
            equal += not worse and dict(first) == dict(then)
            better += not worse and dict(first) != dict(then)
        lines += [f"{op} new: {name}"] * (len(there) - len(here)) + [f"{op} gone: {name}"] * (len(here) - len(there))
    return [*lines, f"{op}: {equal} kernels as stored, {better} others no worse"]


def regressions(before: Row, after: Row) -> Iterator[str]:
    for name, amount in AMOUNTS.items():
        old, new = amount(before), amount(after)
        if new > old:
            yield f"{name} {abs(old)} -> {abs(new)}"


def _by_kernel(rows: Iterable[Row]) -> dict[str, Sequence[Row]]:
    found = defaultdict(list)
    for row in rows:
        found[", ".join(f"{name} {value}" for name, value in row.items() if name not in OUTCOME)].append(row)
    return dict(found)
