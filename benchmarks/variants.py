"""The calls that a benchmark times, ours and its peers', each to be run forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.timing import Parts
from vlkernels import ops
from vlkernels.core.spec import Benchmark, InputMaker, OpSpec, Peer
from vlkernels.testing.arguments import differentiable_tensors, floating_outputs

TellAbsent = Callable[[str, str], object]
"""Takes a peer's name, and why it does not run here."""


def benchmarks_of(spec: OpSpec, device: str) -> dict[str, Benchmark]:
    """The op's benchmarks on this kind of device, what they leave open filled in."""
    found = {}
    for name, declared in spec.benchmarks.items():
        made = declared if isinstance(declared, Benchmark) else Benchmark(declared)
        if device in made.devices:
            peers = {"reference": spec.reference, **spec.peers} if made.peers is None else made.peers
            dtypes = made.dtypes or spec.dtypes
            found[name] = replace(made, dtypes=dtypes, peers=peers, call=made.call or spec.functional)
    return found


def only_variant(op: str, name: str, dtype: str, variant: str) -> Step:
    """One variant of a CPU benchmark by its names, run once."""
    spec = next(spec for spec in ops.specs() if spec.name == op)
    benchmark = benchmarks_of(spec, "cpu")[name]
    peers = {peer: call for peer, call in benchmark.peers.items() if peer == variant}
    arguments = benchmark.make(InputMaker(getattr(torch, dtype), "cpu"))
    return variants(replace(benchmark, peers=peers), arguments, lambda *_: None, ours=not peers)[variant]


class Step:
    """Forward and backward of a call, to be timed one after the other."""

    def __init__(self, call: Callable[[], Any], inputs: list[torch.Tensor], rival: bool):
        self.rival = rival
        self._call, self._inputs = call, inputs
        self._outputs: list[torch.Tensor] = []
        self._upstream: list[torch.Tensor] = []

    def parts(self) -> Parts:
        return {"forward": self.forward, "backward": self.backward} if self._upstream else {"forward": self._call}

    def trial(self) -> Step:
        """Run it once: what cannot run raises here, and whether there is something to differentiate is known afterwards."""
        self.forward()
        generators = [torch.Generator(t.device).manual_seed(7) for t in self._outputs]
        self._upstream = [
            torch.randn(t.shape, generator=g, device=t.device, dtype=t.dtype) for t, g in zip(self._outputs, generators)
        ]
        self.backward()
        return self

    def peak_bytes(self) -> int:
        """The most that a forward and backward hold at once on the card, beside what is there before."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for part in self.parts().values():
            part()
        return torch.cuda.max_memory_allocated() - before

    def forward(self) -> None:
        self._outputs = [t for t in floating_outputs(self._call()) if t.requires_grad]

    def backward(self) -> object:
        outputs, self._outputs = self._outputs, []
        return torch.autograd.grad(outputs, self._inputs, self._upstream, allow_unused=True) if outputs else None


def variants(benchmark: Benchmark, arguments: dict[str, Any], tell_absent: TellAbsent, ours: bool = True) -> dict[str, Step]:
    """What ``auto`` takes, if ``ours``, and every peer that runs here; of the others the reason is told."""
    inputs = list(differentiable_tensors(arguments).values())
    steps = {}
    if ours:
        steps["vlkernels"] = Step(partial(benchmark.call, **arguments, impl="auto"), inputs, rival=False).trial()
    for name, peer in benchmark.peers.items():
        try:
            if isinstance(peer, Peer):
                steps[name] = Step(*peer.prepare(**arguments), rival=peer.rival).trial()
            else:
                steps[name] = Step(partial(peer, **arguments), inputs, rival=name != "reference").trial()
        except Exception as reason:  # other people's code: whatever it fails with, the others are timed
            tell_absent(name, first_line(reason))
    return steps


def first_line(reason: BaseException) -> str:
    return (str(reason) or type(reason).__name__).splitlines()[0][:160]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
