"""What an op declares about itself; the contract tests and the benchmarks read nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.dispatch import Implementation
from vlkernels.core.layout import SegmentLayout
from vlkernels.core.random import Rng
from vlkernels.core.triton_runtime import Launch


class InputMaker:
    """Makes the inputs of a case: the same values for every dtype and device, drawn in float64 from one seed.

    On the meta device nothing is drawn: forms alone, of any size.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0):
        self.dtype = dtype
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._here: torch.Generator | None = None

    def normal(self, *shape: int, grad: bool = True, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values; ``dtype`` overrides the case's (float32 weights beside bfloat16 data)."""
        if self.device.type == "meta":
            return torch.empty(shape, device="meta", dtype=self._pick(dtype)).requires_grad_(grad)
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale
        # Values are first rounded to bfloat16, so every dtype of a case sees exactly the same numbers.
        exact = drawn.to(torch.bfloat16)
        return exact.to(self.device, self._pick(dtype)).requires_grad_(grad)

    def drawn(self, *shape: int) -> Tensor:
        """Normal values for a benchmark, drawn on the device in its dtype: hundreds of millions take no time there."""
        if self.device.type == "meta":
            return self.normal(*shape)
        if self._here is None:
            self._here = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=self._here, device=self.device, dtype=self.dtype).requires_grad_()

    def _pick(self, dtype: torch.dtype | None) -> torch.dtype:
        return self.dtype if dtype is None or self.dtype == torch.float64 else dtype

    def counts(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        """Integers that stay on the host: lengths and sizes."""
        return torch.randint(low, high, tuple(shape), generator=self._generator)

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return self.counts(low, high, shape).to(self.device, dtype)

    def layout(self, lengths: Any, **options: Any) -> SegmentLayout:
        return SegmentLayout(lengths, **options).to(self.device)

    def rng(self, seed: int = 1234) -> Rng:
        return Rng(seed, device=self.device)


Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A named set of inputs: ``make(fill)`` returns the keyword arguments of the functional, without ``impl``."""

    name: str
    make: Callable[[InputMaker], Arguments]


@dataclass(frozen=True)
class Cost:
    """The least work an op can do: bytes that must move and floating-point operations, forward and backward."""

    forward_bytes: int = 0
    backward_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class Peer:
    """Somebody else's way, with what it has done before the clock starts (padding, masks, sorting).

    ``prepare`` takes the case's arguments and returns the call to time and the tensors it is differentiated by. One that is no
    ``rival`` computes something else: it shows what a part of the call costs.
    """

    prepare: Callable[..., tuple[Callable[[], Any], list[Tensor]]]
    rival: bool = True


@dataclass(frozen=True)
class Benchmark:
    """Inputs worth timing: on which devices, in which dtypes (default: the op's), beside whom (default: the op's peers and the
    reference). ``call`` is timed instead of the functional: it takes the inputs and ``impl``. ``peak_memory``: on a CPU the most
    bytes held at once are measured too, in processes of their own."""

    make: Callable[[InputMaker], Arguments]
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: Sequence[torch.dtype] | None = None
    peers: Mapping[str, Peer] | None = None
    call: Callable[..., Any] | None = None
    peak_memory: bool = False


@dataclass(frozen=True)
class Variant:
    """A kernel that some call needs: what the call says (dtype, widths, flags) and the launch, compiled but never run."""

    kernel: str
    facts: Mapping[str, Any]
    launch: Launch


@dataclass(frozen=True)
class OpSpec:
    """An op: its functional, the reference that defines it, the order ``auto`` follows, and its cases.

    Args:
        benchmarks: named inputs worth timing; each value is ``make(fill)`` as in :class:`Case`, or a :class:`Benchmark`.
        peers: other people's way to compute the same, timed side by side: a function of the case's arguments, or a
            :class:`Peer`.
        cost: floor of a call from its arguments.
        held: for an op whose gradient by definition holds something constant: ``held(**arguments)`` returns the reference
            with that thing kept as it is there, so that finite differences do not see it move.
        deterministic: two runs give the same bits.
        variants: the Triton kernels worth compiling ahead of time for an architecture (90 is sm_90); imports Triton.
    """

    name: str
    functional: Callable[..., Any]
    reference: Callable[..., Any]
    implementations: Sequence[Implementation]
    cases: Sequence[Case]
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    benchmarks: Mapping[str, Callable[[InputMaker], Arguments] | Benchmark] = field(default_factory=dict)
    peers: Mapping[str, Callable[..., Any] | Peer] = field(default_factory=dict)
    cost: Callable[..., Cost] | None = None
    held: Callable[..., Callable[..., Any]] | None = None
    deterministic: bool = True
    variants: Callable[[int], Iterable[Variant]] | None = None
