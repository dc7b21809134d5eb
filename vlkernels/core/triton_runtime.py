"""Where Triton kernels run, what they are configured for, and launches that can also be compiled alone. Imports no Triton."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass, field
from typing import Any

import torch

from vlkernels.core.dispatch import Implementation

OLDEST_TRITON = (3, 6)
OLDEST_ARCHITECTURE = 80
# The interpreter runs the tiles that a Hopper card would: what is proven without a card is what runs on one.
INTERPRETED_ARCHITECTURE = 90

# Softmax in powers of two: a scale holds log2 e, a logarithm is turned back by ln 2.
LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453

_interpreted = False


@dataclass(frozen=True)
class TritonImplementation(Implementation):
    """Triton kernels: on CUDA; on a CPU only when asked for by name, in the interpreter."""

    name: str = "triton"
    on_request: tuple[str, ...] = ("cpu",)

    def refusal_on(self, device_type: str) -> str | None:
        return Implementation.refusal_on(self, device_type) or missing(device_type)


@torch.compiler.assume_constant_result  # a graph takes the answer
def missing(device_type: str) -> str | None:
    """Why Triton kernels cannot run on this kind of device here; ``None`` when they can."""
    if device_type == "cuda":
        return _missing_on_a_card()
    if not _interpreted:
        return "on a CPU it runs in Triton's interpreter only (vlkernels.testing.interpreter)"
    return None


def serve_interpreted() -> None:
    """Let kernels serve CPU tensors: said by ``vlkernels.testing.interpreter`` when it has repaired the interpreter."""
    global _interpreted
    _interpreted = True


def architecture(device: torch.device) -> int:
    """The architecture kernels are configured for: 90 is sm_90."""
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def family(architecture: int) -> int:
    """80, 90, 100, or 86 for the cards with less shared memory (sm_86, sm_89, sm_120)."""
    if architecture == 80:
        return 80
    return {9: 90, 10: 100}.get(architecture // 10, 86)


@dataclass(frozen=True)
class Launch:
    """A kernel with everything its launch needs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", {**self.constants, "num_warps": self.warps, "num_stages": self.stages})

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](*self.arguments, **self.options)

    def compile(self) -> Any:
        """The compiled kernel for the active driver's target, not launched."""
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)


@functools.cache
def _missing_on_a_card() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"it needs triton >= {'.'.join(map(str, OLDEST_TRITON))}, this is {version}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    oldest = min(_architecture(index) for index in range(torch.cuda.device_count()))
    if oldest < OLDEST_ARCHITECTURE:
        return f"it needs sm_{OLDEST_ARCHITECTURE} or later, a device here is sm_{oldest}"
    return None


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
