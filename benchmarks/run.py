"""`python -m benchmarks.run [--device cpu|cuda] [--op NAME] [--missing | --list | --dry-run]`: benchmarks, beside their peers.

An op whose contract is red prints no time. A result is stored as soon as it is there, in benchmarks/results/<device>/<op>.jsonl
with its provenance, so that a run that is cut off loses nothing, and the next one with --missing times the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, roof
from benchmarks.launches import launches
from benchmarks.provenance import RESULTS, CardLog, store, stored
from benchmarks.timing import Timing, interleaved_parts
from benchmarks.variants import Step, benchmarks_of, first_line, short, variants
from engine.training.host_memory import keep_large_blocks
from vlkernels import ops
from vlkernels.core.spec import Benchmark, Cost, InputMaker, OpSpec
from vlkernels.testing import contract

DIRECTIONS = ("forward", "backward")
COPY = "copy of as many bytes"
# A run starts nothing after so many seconds, whatever is left to time.
LIMIT_S = {"cpu": 600.0, "cuda": 480.0}
# Of measuring, per benchmark and dtype.
BUDGET_S = {"cpu": 1.0, "cuda": 1.5}
HEAPS = "on a CPU: kept: freed memory stays with the process, as in the engine; default: as glibc has it where nobody says so"

Timings = dict[str, dict[str, Timing]]


@dataclass
class Run:
    """What a run was asked for, and what it has found out on its way."""

    device: str
    budget_s: float
    results: Path
    ends: float = float("inf")
    only_missing: bool = False
    only: tuple[str, ...] = ()
    heap: str | None = None
    roofs: dict[torch.dtype, roof.Roof] = field(default_factory=dict)
    card: CardLog = field(default_factory=CardLog)
    absent: dict[str, str] = field(default_factory=dict)

    def is_over(self) -> bool:
        return time.monotonic() > self.ends

    def roof_of(self, dtype: torch.dtype) -> roof.Roof:
        """What the device can do in this dtype, measured once."""
        if dtype not in self.roofs:
            found = self.roofs[dtype] = roof.measure(self.device, dtype)
            rates = f"products {significant(found.flops / 1e12)} TFLOP/s, copy {significant(found.bytes / 1e9)} GB/s"
            print(f"{short(dtype)} here: {rates}", flush=True)
        return self.roofs[dtype]

    def tell_absent(self, peer: str, reason: str) -> None:
        """Why a peer does not run here: kept with the row, printed once."""
        if self.absent.get(peer) != reason:
            print(f"  {peer} does not run here: {reason}", flush=True)
        self.absent[peer] = reason


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--op", action="append", help="only this op; may be given several times")
    parser.add_argument("--benchmark", action="append", help="only benchmarks of this name; may be given several times")
    parser.add_argument("--budget-s", type=float, help=f"seconds of measuring per benchmark and dtype; default: {BUDGET_S}")
    parser.add_argument("--limit-s", type=float, help=f"start nothing after so many seconds; default: {LIMIT_S}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder the results are appended to")
    parser.add_argument("--heap", default="kept", choices=("kept", "default"), help=HEAPS)
    parser.add_argument("--missing", action="store_true", help="only rows without a result of this very source")
    parser.add_argument("--list", action="store_true", help="print the rows and their peers, and time nothing")
    parser.add_argument("--dry-run", action="store_true", help="the rows of a card as far as they come without one")
    options = parser.parse_args(arguments)
    chosen = [spec for spec in ops.specs() if not options.op or spec.name in options.op]
    known = {"op": {spec.name for spec in ops.specs()}, "benchmark": {name for spec in chosen for name in spec.benchmarks}}
    for kind, names in known.items():
        if unknown := set(getattr(options, kind) or ()) - names:
            parser.error(f"--{kind}: there is no {', '.join(sorted(unknown))}, only {', '.join(sorted(names))}")
    if options.list:
        print(*(line for spec in chosen for line in listed(spec, options.device)), sep="\n")
        return 0
    if options.dry_run:
        from benchmarks import dry_run  # asks for Triton

        return dry_run.run(chosen, options.limit_s)
    on_card = options.device == "cuda"
    if on_card and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    ends = time.monotonic() + (LIMIT_S[options.device] if options.limit_s is None else options.limit_s)
    heap = None if on_card else options.heap
    budget_s = BUDGET_S[options.device] if options.budget_s is None else options.budget_s
    only = tuple(options.benchmark or ())
    run = Run(options.device, budget_s, options.results, ends, only_missing=options.missing, only=only, heap=heap)
    if heap == "kept":
        keep_large_blocks()
    with run.card if on_card else contextlib.nullcontext():
        failed = sum(not run_op(spec, run) for spec in chosen)
    return 1 if failed else 0


def listed(spec: OpSpec, device: str) -> list[str]:
    return [
        f"{spec.name}, {name}, {' and '.join(map(short, benchmark.dtypes))}: beside {'; '.join(benchmark.peers)}"
        for name, benchmark in benchmarks_of(spec, device).items()
    ]


def still_missing(spec: OpSpec, run: Run) -> dict[str, Benchmark]:
    """The benchmarks of this run, each with the dtypes that are to be timed."""
    benchmarks = {name: of for name, of in benchmarks_of(spec, run.device).items() if name in run.only or not run.only}
    if not run.only_missing:
        return benchmarks
    there = stored(spec.name, run.device, run.heap, run.results)
    left = {
        name: replace(benchmark, dtypes=[dtype for dtype in benchmark.dtypes if (name, str(dtype)) not in there])
        for name, benchmark in benchmarks.items()
    }
    return {name: benchmark for name, benchmark in left.items() if benchmark.dtypes}


def run_op(spec: OpSpec, run: Run) -> bool:
    """Time one op; ``False`` when its contract is red, and then no time is printed, or when a benchmark failed."""
    benchmarks = still_missing(spec, run)
    if not benchmarks:
        return True
    if run.is_over():
        print(f"{spec.name}: not timed, the time of this run is up", flush=True)
        return True
    dtypes = sorted({dtype for benchmark in benchmarks.values() for dtype in benchmark.dtypes}, key=str)
    try:
        verify(spec, dtypes, run.device)
    except Exception as error:  # whatever a kernel fails with
        print(f"{spec.name}: contract is red, not timed: {first_line(error)}", flush=True)
        return False
    done = all([run_benchmark(spec, name, benchmark, run) for name, benchmark in benchmarks.items()])
    memory.give_back()
    return done


def verify(spec: OpSpec, dtypes: list[torch.dtype], device: str) -> None:
    for case in spec.cases:
        for dtype in dtypes:
            for impl in contract.implementations_here(spec, case, dtype, device):
                contract.verify(spec, case, dtype, impl, device)


def run_benchmark(spec: OpSpec, name: str, benchmark: Benchmark, run: Run) -> bool:
    """Time one benchmark in its dtypes and store what came; ``False`` when our own call fails."""
    for dtype in benchmark.dtypes:
        if run.is_over():
            print(f"{spec.name}, {name}, {short(dtype)}: not timed, the time of this run is up", flush=True)
            continue
        try:
            row = timed(spec, name, benchmark, dtype, run)
        except Exception as reason:
            print(f"{spec.name}, {name}, {short(dtype)}: FAILED: {first_line(reason)}", flush=True)
            return False
        store(spec.name, row, run.device, run.results)
        if run.device == "cuda":
            torch.cuda.empty_cache()
    return True


def timed(spec: OpSpec, name: str, benchmark: Benchmark, dtype: torch.dtype, run: Run) -> dict[str, Any]:
    """One row: the times of everybody, printed and returned."""
    arguments = benchmark.make(InputMaker(dtype, run.device))
    cost = spec.cost(**arguments) if spec.cost else None
    calls: dict[str, Step | roof.Copies] = {**variants(benchmark, arguments, run.tell_absent)}
    absent = {peer: run.absent[peer] for peer in benchmark.peers if peer not in calls}
    peak_bytes = peaks(spec, name, benchmark, dtype, run, calls)
    kernels = {variant: launches(step.parts()) for variant, step in calls.items()} if run.device == "cuda" else None
    here = run.roof_of(dtype) if cost else None
    if cost is not None and cost.forward_bytes and not cost.forward_flops:
        calls[COPY] = roof.Copies(cost, run.device)
    run.card.take()
    timings = interleaved_parts({variant: step.parts() for variant, step in calls.items()}, run.device, run.budget_s, warm=True)
    card = run.card.take()
    derived = derive(timings, [variant for variant, step in calls.items() if step.rival], cost, here)
    show(f"{spec.name}, {name}, {short(dtype)}", timings, derived, peak_bytes, kernels)
    return {
        "op": spec.name,
        "benchmark": name,
        "dtype": str(dtype),
        "seconds": {variant: asdict(parts["total"]) for variant, parts in timings.items()},
        **{part: {v: asdict(parts[part]) for v, parts in timings.items() if part in parts} for part in DIRECTIONS},
        "cost": asdict(cost) if cost else None,
        "derived": derived,
        "peak_bytes": peak_bytes,
        "absent": absent,
        "launches": kernels,
        "roof": asdict(here) if here else None,
        "card": card,
        "heap": run.heap,
    }


def peaks(
    spec: OpSpec, name: str, benchmark: Benchmark, dtype: torch.dtype, run: Run, steps: Mapping[str, Step]
) -> dict[str, int | None] | None:
    """The most bytes each variant holds at once: on a card, and where a CPU benchmark asks for it, once for both heaps."""
    if run.device == "cuda":
        return {variant: step.peak_bytes() for variant, step in steps.items()}
    if not benchmark.peak_memory or run.heap == "default":
        return None
    return {variant: memory.peak_bytes(spec.name, name, short(dtype), variant) for variant in steps}


def derive(timings: Timings, rivals: list[str], cost: Cost | None, roof_here: roof.Roof | None) -> dict[str, dict[str, Any]]:
    """By direction: the best rival's time over ours, and of the work that must be done the rate and the share of the roof.

    Where bytes alone must move, the rate is theirs, and there is also the share of a copy of as many bytes, timed in this row.
    """
    found: dict[str, dict[str, Any]] = {}
    for part in DIRECTIONS:
        seconds = {variant: parts[part].median for variant, parts in timings.items() if part in parts}
        flops, moved = (getattr(cost, f"{part}_{work}") if cost else 0 for work in ("flops", "bytes"))
        own: dict[str, Any] = {}
        if flops:
            own["tflops"] = {variant: flops / taken / 1e12 for variant, taken in seconds.items()}
        elif moved:
            own["gb_per_s"] = {variant: moved / taken / 1e9 for variant, taken in seconds.items()}
        if COPY in seconds:
            own["share_of_copy"] = {variant: seconds[COPY] / taken for variant, taken in seconds.items()}
        if roof_here and (flops or moved):
            least = roof_here.seconds(flops, moved)
            own["share_of_roof"] = {variant: least / taken for variant, taken in seconds.items()}
        there = [variant for variant in rivals if variant in seconds]
        if there and "vlkernels" in seconds:
            best = min(there, key=seconds.__getitem__)
            own["best_peer"] = {"name": best, "times_ours": seconds[best] / seconds["vlkernels"]}
        found[part] = own
    return found


def show(
    title: str,
    timings: Timings,
    derived: Mapping[str, Mapping[str, Any]],
    peak_bytes: Mapping[str, int | None] | None = None,
    kernels: Mapping[str, Mapping[str, int] | None] | None = None,
) -> None:
    print(title)
    ours, widest = timings["vlkernels"], max(map(len, timings))
    for variant, parts in timings.items():
        columns = [_column(part, parts[part], variant, derived[part]) for part in DIRECTIONS if part in parts]
        if parts.keys() == ours.keys():
            columns.append(f"{parts['total'].median / ours['total'].median:6.2f}x")
        if peak_bytes and (peak := peak_bytes.get(variant)) is not None:
            columns.append(f"peak {peak / 2**20:,.0f} MiB")
        if kernels and (launched := kernels.get(variant)):
            columns.append(f"{' + '.join(map(str, launched.values()))} launches")
        print(f"  {variant:<{widest}} {' | '.join(columns)}")
    for part in DIRECTIONS:
        if best := derived[part].get("best_peer"):
            print(f"  {part}: the best peer, {best['name']}, takes {best['times_ours']:.2f} times as long")
    sys.stdout.flush()


def _column(part: str, timing: Timing, variant: str, derived: Mapping[str, Any]) -> str:
    column = f"{part} {timing.median * 1e3:9.3f} ms [{timing.low * 1e3:.3f}, {timing.high * 1e3:.3f}]"
    for rate, unit in (("tflops", "TFLOP/s"), ("gb_per_s", "GB/s")):
        if rate in derived:
            column += f" {significant(derived[rate][variant]):>6} {unit}"
    for share, of in (("share_of_copy", "copy"), ("share_of_roof", "roof")):
        if share in derived:
            column += f" {derived[share][variant]:4.0%} of {of}"
    return column if timing.host is None else f"{column} host {timing.host * 1e6:4.0f} us"


def significant(value: float) -> str:
    """Three digits that say something: 0.0912, 1.86, 790, 4320."""
    if not value:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


if __name__ == "__main__":
    sys.exit(main())
