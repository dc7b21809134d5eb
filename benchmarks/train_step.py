"""Whole training steps: the packed models beside padded ones.

    python -m benchmarks.train_step [--device cpu|cuda] [--system NAME] [--dry-run]

A step is forward, backward and AdamW, with dropout where the model has it. All variants of a system have the same
weights, and none is timed before their losses agree; batches are built before the clock starts, and the variants take
turns. On a card all systems have their published size; on a CPU they have fewer layers and batches are small.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.provenance import RESULTS, store
from benchmarks.steps import where
from benchmarks.steps.shapes import systems
from benchmarks.steps.system import HUGGING_FACE, PACKED, PADDED, System, spread
from benchmarks.timing import Reading, Timing, clock_of, interleaved
from engine.training.host_memory import keep_large_blocks

TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
SAMPLES_COMPARED = 4


class Step:
    """Forward, backward and update of one model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.draws = [part.rng for part in model.modules() if isinstance(getattr(part, "rng", None), vk.Rng)]

    def __call__(self, batch: Any) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model(batch).backward()
        self.optimizer.step()
        for rng in self.draws:
            rng.advance()


@dataclass(frozen=True)
class Both:
    """The same samples as either kind of model reads them."""

    samples: list[Any]
    packed: Any
    padded: Any

    @classmethod
    def of(cls, system: System, samples: list[Any], device: str) -> Both:
        return cls(samples, system.packed(samples).to(device), system.padded(samples).to(device))

    def read_by(self, variant: str) -> Any:
        return self.packed if variant == PACKED else self.padded


Batches = Mapping[str, list[Both]]
PEERS = (PADDED, HUGGING_FACE)
Readings = dict[str, list[Reading]]
TIMED = {"random": (PACKED, *PEERS), "bucketed": (PACKED, PADDED)}


def dry_run(system: System, dtype: torch.dtype) -> None:
    """Every variant forward and backward without a card and without values, on two samples."""
    with torch.device("meta"):
        models, absent = make_models(system, "meta")
    random = np.random.default_rng(0)
    both = Both.of(system, [system.sample(lengths, random) for lengths in system.lengths(2, random).tolist()], "meta")
    millions = sum(p.numel() for p in models[PACKED].parameters()) / 1e6
    print(f"{system.name}, {system.layers}, {system.pairs} samples of a random batch, {millions:.1f} M parameters")
    for name, model in models.items():
        model.to(dtype)(both.read_by(name)).backward()
        print(f"  {name}: runs on tensors without values")
    for name, reason in absent.items():
        print(f"  {name} does not run here: {reason}")


def make_models(system: System, device: str, peers: Sequence[str] = PEERS) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """By variant; and why a peer is not here."""
    torch.manual_seed(0)
    models, absent = {PACKED: system.model()}, {}
    for name in peers:
        try:
            models[name] = system.peer(name, models[PACKED])
        except (ImportError, ValueError) as reason:
            absent[name] = str(reason).splitlines()[0]
    return {name: model.to(device) for name, model in models.items()}, absent


@torch.no_grad()
def compare(system: System, models: Mapping[str, nn.Module], device: str) -> None:
    """Without dropout, the losses are the same."""
    random = np.random.default_rng(1)
    samples = [system.sample(lengths, random) for lengths in system.lengths(SAMPLES_COMPARED, random).tolist()]
    both, losses = Both.of(system, samples, device), {}
    for name, model in models.items():
        model.eval()
        options = {} if name == PACKED else system.agreeing(models[PACKED], both.packed)
        losses[name] = float(model(both.read_by(name), **options))
    for name, model in models.items():
        model.train()
        error = abs(losses[name] - losses[PACKED])
        assert error <= TOLERANCE[device] * abs(losses[PACKED]), f"{PACKED} loss {losses[PACKED]}, {name} {losses[name]}"


def make_batches(system: System, count: int, device: str) -> Batches:
    """`count` batches of each kind from one pool, small and large ones alike."""
    lengths, batches = system.batches(np.random.default_rng(0))

    def both(index: Tensor) -> Both:
        samples = [system.sample(lengths[i].tolist(), np.random.default_rng(i)) for i in index.tolist()]
        return Both.of(system, samples, device)

    return {kind: [both(index) for index in spread(some, lengths, count)] for kind, some in batches.items()}


def measure(steps: Mapping[str, Step], batches: Batches, device: str, dtype: torch.dtype) -> tuple[Readings, float]:
    """By variant and kind, one batch of each kind after another; before them all the largest, so that its memory is kept.

    And the rate of matrix products: the best one of this run.
    """
    clock, rate = clock_of(device), product_rate(device, dtype)

    def timed(name: str, both: Both) -> Reading:
        return clock.measure(name, lambda: steps[name](both.read_by(name)))

    for name in steps:
        timed(name, batches["random"][-1])
    cases = [(kind, name) for kind, names in TIMED.items() for name in names if name in steps]
    readings: Readings = {f"{name}, {kind}": [] for kind, name in cases}
    for number in range(len(batches["random"])):
        for kind, name in cases:
            readings[f"{name}, {kind}"].append(timed(name, batches[kind][number]))
        rate = max(rate, product_rate(device, dtype))
    return readings, rate


def figures(system: System, batches: Batches, readings: Readings, matmul: float) -> dict[str, Any]:
    """What the readings come to: speeds over all batches of a kind, and the median of the ratios of single steps."""
    found: dict[str, Any] = {name: {} for name in ("packed_times_as_fast", "samples_per_s", "tokens_per_s", "mfu")}
    for variant, taken in readings.items():
        name, kind = variant.rsplit(", ", 1)
        seconds, ours = sum(reading.seconds for reading in taken), readings[f"{PACKED}, {kind}"]
        tokens, samples = (sum(counts) for counts in zip(*(system.tokens(both.packed) for both in batches[kind])))
        found["samples_per_s"][variant] = samples / seconds
        found["tokens_per_s"][variant] = tokens / seconds
        found["mfu"][variant] = sum(system.flops(both.packed) for both in batches[kind]) / seconds / matmul
        if name != PACKED:
            ratios = [theirs.seconds / own.seconds for theirs, own in zip(taken, ours, strict=True)]
            found["packed_times_as_fast"][variant] = statistics.median(ratios)
    found["padded_by_true"] = {
        kind: sum(system.padded_tokens(both.padded) for both in some) / sum(system.tokens(both.packed)[0] for both in some)
        for kind, some in batches.items()
    }
    return found


def look_inside(system: System, steps: Mapping[str, Step], both: Both, device: str) -> dict[str, dict[str, Any]]:
    """Shares of the time of one step, its data's collation included, and the memory it takes beside weights and moments."""
    found: dict[str, dict[str, Any]] = {"breakdown": {}, "peak_bytes": {}}
    for name, step in steps.items():
        collate = system.packed if name == PACKED else system.padded

        def whole(step: Step = step, collate: Any = collate) -> None:
            with torch.profiler.record_function(where.DATA):
                batch = collate(both.samples).to(device)
            step(batch)

        step.optimizer.zero_grad(set_to_none=True)
        found["breakdown"][name], found["peak_bytes"][name] = where.take(whole, step.model, device)
    return found


def spread_of(taken: Sequence[Reading]) -> Timing:
    """Of batches of different sizes: the median, the least and the most."""
    seconds = [reading.seconds for reading in taken]
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large product, by whichever of PyTorch and the library is faster."""
    side = 8192 if device == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    calls = {"PyTorch": lambda: F.linear(left, right), "vlkernels": lambda: vk.linear(left, right)}
    with torch.no_grad():
        taken = interleaved(calls, device, budget_s=0.5)
    return 2 * side**3 / min(timing.low for timing in taken.values())


def run(
    system: System, device: str, dtype: torch.dtype, count: int, peers: Sequence[str] = PEERS
) -> dict[str, Any]:
    models, absent = make_models(system, device, peers)
    compare(system, models, device)
    steps = {name: Step(model.to(dtype)) for name, model in models.items()}
    batches = make_batches(system, count, device)
    readings, matmul = measure(steps, batches, device, dtype)
    return {
        "benchmark": f"{system.name} step",
        "layers": system.layers,
        "pairs": system.pairs,
        "lengths": system.lengths_are,
        "dtype": str(dtype),
        "parameters": sum(p.numel() for p in models[PACKED].parameters()),
        "seconds": {variant: asdict(spread_of(taken)) for variant, taken in readings.items()},
        **figures(system, batches, readings, matmul),
        **look_inside(system, steps, batches["random"][0], device),
        "matmul_flops": matmul,
        "absent": absent,
    }


def show(row: Mapping[str, Any]) -> None:
    print(f"{row['benchmark']}, {row['layers']}, {row['dtype'].removeprefix('torch.')}")
    for variant, timing in row["seconds"].items():
        ratio = row["packed_times_as_fast"].get(variant, 1.0)
        speeds = f"{row['samples_per_s'][variant]:8.2f} samples/s {row['tokens_per_s'][variant]:9.0f} tokens/s"
        print(f"  {variant:<26} {timing['median']:8.3f} s {speeds} MFU {row['mfu'][variant]:5.1%} packed {ratio:5.2f}x as fast")
    for name, shares in row["breakdown"].items():
        told = ", ".join(f"{part} {share:.1%}" for part, share in sorted(shares.items(), key=lambda item: -item[1]))
        print(f"  {name}: {row['peak_bytes'][name] / 2**20:,.0f} MiB; {told}")
    for name, reason in row["absent"].items():
        print(f"  {name} does not run here: {reason}")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=("tiny", "small", "full"), help="default: small on a CPU, full on a card")
    parser.add_argument("--system", action="append", help="only this one, by the begin of its name; several times for several")
    parser.add_argument("--peer", action="append", choices=PEERS, help="only beside this one")
    parser.add_argument("--batches", type=int, default=2, help="of each kind")
    parser.add_argument("--dry-run", action="store_true", help="run all on tensors without values, and time nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder the results are appended to")
    options = parser.parse_args(arguments)
    device, dtype = options.device, torch.bfloat16 if options.device == "cuda" else torch.float32
    asked = tuple(name.lower() for name in options.system or ("",))
    size = options.size or ("full" if device == "cuda" else "small")
    chosen = [system for system in systems(size) if system.name.lower().startswith(asked)]
    if not chosen:
        parser.error(f"--system: none begins with {' or '.join(asked)}: {', '.join(system.name for system in systems(size))}")
    if options.batches < 2:
        parser.error(f"--batches must be at least 2, so that there is a spread, got {options.batches}")
    if options.dry_run:
        for system in chosen:
            dry_run(system, dtype)
        return 0
    keep_large_blocks()
    failed = 0
    for system in chosen:
        try:
            row = run(system, device, dtype, options.batches, options.peer or PEERS)
        except AssertionError as difference:
            print(f"{system.name}: the variants differ, not timed: {difference}", flush=True)
            failed = 1
            continue
        show(row)
        store("train_step", row, device, options.results)
    return failed


if __name__ == "__main__":
    sys.exit(main())
