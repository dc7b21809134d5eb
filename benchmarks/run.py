"""`python -m benchmarks.run [--device cpu|cuda] [--op NAME]`: every declared benchmark, side by side with its peers.

An op whose contract is red prints no time. Results are appended to benchmarks/results/<device>/<op>.jsonl with their provenance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import RESULTS, store
from benchmarks.timing import Timing, interleaved
from engine.training.host_memory import keep_large_blocks
from vlkernels import ops
from vlkernels.core.spec import InputMaker, OpSpec, Peer
from vlkernels.testing import contract
from vlkernels.testing.arguments import cotangents, differentiable_tensors, floating_outputs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--op", action="append", help="only this op; may be given several times")
    parser.add_argument("--budget-s", type=float, default=2.0, help="seconds of measuring per benchmark and dtype")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder the results are appended to")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    keep_large_blocks()
    red = 0
    for spec in ops.specs():
        if spec.benchmarks and (not options.op or spec.name in options.op):
            red += not run_op(spec, options)
    return 1 if red else 0


def run_op(spec: OpSpec, options: argparse.Namespace) -> bool:
    """Time one op; ``False`` when its contract is red, and then no time is printed."""
    try:
        for case in spec.cases:
            for impl in contract.implementations_here(spec, case, torch.float32, options.device):
                contract.verify(spec, case, torch.float32, impl, options.device)
    except AssertionError as error:
        print(f"{spec.name}: contract is red, not timed: {error}")
        return False
    for name, make in spec.benchmarks.items():
        for dtype in spec.dtypes:
            timings = interleaved(variants(spec, make, dtype, options.device), options.device, options.budget_s)
            show(spec.name, name, dtype, timings)
            seconds = {variant: vars(timing) for variant, timing in timings.items()}
            cost = vars(spec.cost(**make(InputMaker(dtype, options.device)))) if spec.cost else None
            row = {"op": spec.name, "benchmark": name, "dtype": str(dtype), "seconds": seconds, "cost": cost}
            store(spec.name, row, options.device, options.results)
    return True


def variants(spec: OpSpec, make: Callable[..., Any], dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """Forward and backward of what ``auto`` takes, of the reference, and of every peer that runs here."""
    calls = {
        "vlkernels": _step(spec.functional, make, dtype, device, impl="auto"),
        "reference": _step(spec.reference, make, dtype, device),
    }
    for peer, function in spec.peers.items():
        step = _step(function, make, dtype, device)
        try:
            step()
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as reason:
            print(f"  {peer} does not run here: {str(reason).splitlines()[0]}")
            continue
        calls[peer] = step
    return calls


def _step(
    function: Callable[..., Any] | Peer, make: Callable[..., Any], dtype: torch.dtype, device: str, **extra: Any
) -> Callable[[], object]:
    arguments = make(InputMaker(dtype, device))
    if isinstance(function, Peer):
        call, inputs = function.prepare(**arguments)
    else:
        call, inputs = partial(function, **arguments, **extra), list(differentiable_tensors(arguments).values())
    upstream: list[torch.Tensor] = []

    def step() -> object:
        outputs = [t for t in floating_outputs(call()) if t.requires_grad]
        if not outputs:
            return None
        if not upstream:
            upstream.extend(cotangents(outputs))
        return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)

    return step


def show(op: str, name: str, dtype: torch.dtype, timings: dict[str, Timing]) -> None:
    ours = timings["vlkernels"].median
    for variant, timing in timings.items():
        print(
            f"{op:<22} {name:<28} {str(dtype).removeprefix('torch.'):<9} {variant:<22} "
            f"{timing.median * 1e3:9.3f} ms [{timing.low * 1e3:.3f}, {timing.high * 1e3:.3f}]  {timing.median / ours:6.2f}x"
        )


if __name__ == "__main__":
    sys.exit(main())
