"""`python -m benchmarks.run --dry-run`: every row of a card as far as it comes without one.

A call is made on tensors of its full size that have no data. Where it asks for a Triton kernel the kernel is compiled for sm_90
and not launched, so that the kernels of a row are those that its call would launch. CUDA C++ is compiled with the library.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import offline
from benchmarks.variants import benchmarks_of, first_line, short
from vlkernels.core import triton_runtime
from vlkernels.core.spec import Benchmark, InputMaker, OpSpec, Peer
from vlkernels.core.triton_runtime import INTERPRETED_ARCHITECTURE, Launch
from vlkernels.testing.arguments import differentiable_tensors, floating_outputs

ON_A_CARD = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@dataclass
class Trial:
    """What a row comes to without a card."""

    compiled_elsewhere: str  # what is said of a call without a Triton kernel
    kernels: dict[str, set[str]] = field(default_factory=dict)  # names, and the hashes of what they were compiled to
    absent: dict[str, str] = field(default_factory=dict)  # peers, and why they cannot be imported
    failure: str | None = None
    seconds: float = 0.0

    def told(self, title: str, peers: list[str]) -> list[str]:
        here = [peer for peer in peers if peer not in self.absent]
        compiled = ", ".join(f"{name} x {len(hashes)}" if len(hashes) > 1 else name for name, hashes in self.kernels.items())
        outcome = f"FAILED: {self.failure}" if self.failure else compiled or self.compiled_elsewhere
        lines = [f"{title}: {outcome} ({self.seconds:.1f} s)", f"  beside {', '.join(here) or 'nobody'}"]
        return lines + [f"  {peer} cannot run here: {reason}" for peer, reason in self.absent.items()]


def run(chosen: Sequence[OpSpec], limit_s: float | None) -> int:
    """1 when a call fails, or a kernel that it would launch does not compile."""
    ends, failed = time.monotonic() + (float("inf") if limit_s is None else limit_s), 0
    rows = [(spec, *row, dtype) for spec in chosen for row in benchmarks_of(spec, "cuda").items() for dtype in row[1].dtypes]
    for number, (spec, name, benchmark, dtype) in enumerate(rows):
        if time.monotonic() > ends:
            print(f"{len(rows) - number} rows are left: the time of this run is up")
            break
        found = trial(spec, benchmark, dtype)
        print(*found.told(f"{spec.name}, {name}, {short(dtype)}", [*benchmark.peers]), sep="\n", flush=True)
        failed += found.failure is not None
    return 1 if failed else 0


def trial(spec: OpSpec, benchmark: Benchmark, dtype: torch.dtype) -> Trial:
    """One row: its kernels compiled, its peers looked for."""
    choices, started = {choice.name for choice in spec.implementations}, time.perf_counter()
    found = Trial("CUDA C++" if "cuda" in choices else "no kernel of ours")
    try:
        arguments = benchmark.make(InputMaker(dtype, "meta"))
        with _card_without_data(found.kernels):
            _call(benchmark, arguments, "triton" if "triton" in choices else "reference")
    except Exception as reason:  # whatever a kernel or its compiler fails with
        found.failure = first_line(reason)
    else:
        found.absent = {name: why for name, peer in benchmark.peers.items() if (why := _absent(peer, arguments))}
    found.seconds = time.perf_counter() - started
    return found


def _call(benchmark: Benchmark, arguments: dict[str, Any], impl: str) -> None:
    """Forward and backward."""
    outputs = [t for t in floating_outputs(benchmark.call(**arguments, impl=impl)) if t.requires_grad]
    inputs = list(differentiable_tensors(arguments).values())
    if outputs and inputs:
        torch.autograd.grad(outputs, inputs, [torch.empty_like(t) for t in outputs], allow_unused=True)


def _absent(peer: Any, arguments: dict[str, Any]) -> str | None:
    """Why the code of a peer is not there; what it does with tensors without data tells nothing about a card."""
    if not isinstance(peer, Peer):
        return None
    try:
        with torch.compiler.set_stance("force_eager"):
            peer.prepare(**arguments)
    except ImportError as reason:
        return first_line(reason)
    except Exception:
        return None
    return None


@contextlib.contextmanager
def _card_without_data(kernels: dict[str, set[str]]) -> Iterator[None]:
    """Dispatch finds a card; launches are compiled for it, and noted in ``kernels``."""

    def compile_alone(launch: Launch) -> None:
        kernels.setdefault(launch.kernel.fn.__name__, set()).add(launch.compile().hash)

    with (
        mock.patch.object(triton_runtime, "_missing_on_a_card", lambda: None),
        mock.patch.object(Launch, "run", compile_alone),
        offline.card(INTERPRETED_ARCHITECTURE),
        _KernelsOfACard(),
    ):
        yield


class _KernelsOfACard(TorchDispatchMode):
    """Our ops run what they have registered for CUDA, in place of their fakes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "vlkernels" and torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CUDA"):
            return function.redispatch(ON_A_CARD, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))
