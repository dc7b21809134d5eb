"""What this device can do at most: the rate of its matrix products and of its memory, measured in the run that uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.timing import interleaved


@dataclass(frozen=True)
class Roof:
    """Floating-point operations per second of a large product, and bytes per second (read and written) of a large copy."""

    flops: float
    bytes: float

    def seconds(self, flops: int, moved: int) -> float:
        """The least time of a call that computes and moves so much."""
        return max(flops / self.flops, moved / self.bytes)


def measure(device: str, dtype: torch.dtype, side: int = 8192, copied: int = 2**30) -> Roof:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty(side, side, device=device, dtype=dtype)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(left, right, out=product), "copy": lambda: target.copy_(source)}
    taken = interleaved(calls, device, budget_s=1.0)
    return Roof(flops=2 * side**3 / taken["product"].median, bytes=2 * copied / taken["copy"].median)
