"""`python -m benchmarks.static [--op NAME]`: every declared Triton kernel compiled for sm_80, sm_90 and sm_100, without a card.

Writes benchmarks/results/static/<op>.jsonl: registers, shared and local memory, tensor-core instructions, occupancy, and prints which
kernels are worse than what was stored. A row names what it was compiled from; a test fails where the kernels, their tiles or the
version of Triton are no longer the row's.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language

from benchmarks import offline, static_changes
from benchmarks.provenance import RESULTS
from vlkernels import ops
from vlkernels.core.spec import OpSpec, Variant

ARCHITECTURES = (80, 90, 100)
FOLDER = RESULTS / "static"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--op", action="append", help="only this op; may be given several times")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile at the same time")
    options = parser.parse_args(arguments)
    for spec in ops.specs():
        if spec.variants is not None and (not options.op or spec.name in options.op):
            write(spec, options.workers)
    return 0


def write(spec: OpSpec, workers: int) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        lines = pool.map(functools.partial(_line, spec.name), range(len(list(declared(spec)))), chunksize=1)
    before = list(stored(spec).values()) if stored_at(spec).exists() else []
    stored_at(spec).write_text("\n".join(lines) + "\n")
    print(*static_changes.told(spec.name, before, map(json.loads, lines)), sep="\n", flush=True)


def _line(name: str, number: int) -> str:
    """The row of one declared kernel, in a process of the pool."""
    architecture, variant = _declared(name)[number]
    row = {**describe(architecture, variant), **compile_and_measure(architecture, variant)}
    show(name, row)
    return json.dumps(row)


@functools.cache
def _declared(name: str) -> list[tuple[int, Variant]]:
    return list(declared(next(spec for spec in ops.specs() if spec.name == name)))


def declared(spec: OpSpec) -> Iterator[tuple[int, Variant]]:
    for architecture in ARCHITECTURES:
        for variant in spec.variants(architecture):
            yield architecture, variant


def describe(architecture: int, variant: Variant) -> dict[str, Any]:
    """What the numbers of a row depend on, and its hash as ``identity``."""
    launch = variant.launch
    facts = {
        "kernel": variant.kernel,
        **variant.facts,
        "architecture": architecture,
        "constants": launch.constants,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "triton": triton.__version__,
    }
    text = json.dumps({**facts, "source": source_of(launch.kernel)}, sort_keys=True)
    return {**facts, "identity": hashlib.sha256(text.encode()).hexdigest()[:16]}


@functools.cache
def source_of(kernel: triton.JITFunction) -> dict[str, str]:
    """The code a kernel is made of and the constants it reads, by name. Triton's own key depends on what was asked for before."""
    found, waiting = {}, [kernel]
    while waiting:
        function = waiting.pop()
        name = f"{function.fn.__module__}.{function.fn.__name__}"
        if name in found:
            continue
        found[name] = f"{function.do_not_specialize} {function.do_not_specialize_on_alignment} {function.src}"
        names, scope = function.fn.__code__.co_names, function.fn.__globals__
        modules = [m for m in map(scope.get, names) if isinstance(m, types.ModuleType) and m.__name__.startswith("vlkernels")]
        for place in (scope, *map(vars, modules)):
            waiting += [place[n] for n in names if isinstance(place.get(n), triton.JITFunction)]
            found |= {f"{name}: {n}": repr(place[n].value) for n in names if isinstance(place.get(n), triton.language.constexpr)}
    return dict(sorted(found.items()))


def compile_and_measure(architecture: int, variant: Variant) -> dict[str, Any]:
    with offline.card(architecture):
        return offline.measure(variant.launch, architecture)


def stored_at(spec: OpSpec) -> Path:
    return FOLDER / f"{spec.name}.jsonl"


def stored(spec: OpSpec) -> dict[str, dict[str, Any]]:
    """The stored rows by identity."""
    rows = [json.loads(line) for line in stored_at(spec).read_text().splitlines()]
    return {row["identity"]: row for row in rows}


def show(op: str, row: dict[str, Any]) -> None:
    products = offline.tensor_core_instructions(row)
    said = " ".join(str(row[name]) for name in ("dtype", "bias") if name in row) + " dropout" * row.get("dropout", False)
    widths = {"K": "head_dim", "slot ": "slot", "D": "width", "texts ": "texts", "images ": "images"}
    said += "".join(f" {letter}{row[name]}" for letter, name in widths.items() if name in row)
    said += "".join(f" {name}" for name in ("labels", "keys") if row.get(name))
    print(
        f"{op} {row['kernel']:<17} {said:<36} sm_{row['architecture']:<4} {row['registers']:>4} registers "
        f"{row['shared_bytes']:>7} B shared {row['stack_bytes']:>5} B stack {offline.local_memory_accesses(row):>4} local accesses "
        f"{products:>4} tensor-core {row['programs_per_sm']} programs/SM",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
