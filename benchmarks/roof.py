"""What this device can do at most: the rate of its matrix products and of its memory, measured in the run that uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.timing import Parts, interleaved
from vlkernels.core.spec import Cost


@dataclass(frozen=True)
class Roof:
    """Floating-point operations per second of a large product, and bytes per second (read and written) of a large copy."""

    flops: float
    bytes: float

    def seconds(self, flops: int, moved: int) -> float:
        """The least time of a call that computes and moves so much."""
        return max(flops / self.flops, moved / self.bytes)


# The side of the matrices and the bytes that are copied: large enough to fill a card, small enough for a processor.
SIZES = {"cuda": (8192, 2**30), "cpu": (2048, 2**26)}


def measure(device: str, dtype: torch.dtype, side: int | None = None, copied: int | None = None) -> Roof:
    side, copied = side or SIZES[device][0], copied or SIZES[device][1]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty(side, side, device=device, dtype=dtype)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(left, right, out=product), "copy": lambda: target.copy_(source)}
    taken = interleaved(calls, device, budget_s=1.0)  # of which the fast ones count: what others do here is not the device's
    return Roof(flops=2 * side**3 / taken["product"].low, bytes=2 * copied / taken["copy"].low)


class Copies:
    """A copy for each direction of a call, reading and writing together as many bytes as the call must move."""

    rival = False

    def __init__(self, cost: Cost, device: str):
        self._parts = {
            part: _copy(moved, device)
            for part, moved in {"forward": cost.forward_bytes, "backward": cost.backward_bytes}.items()
            if moved
        }

    def parts(self) -> Parts:
        return self._parts


def _copy(moved: int, device: str) -> Callable[[], object]:
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
