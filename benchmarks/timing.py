"""Side-by-side timing: variants take turns in one process, so noise of the machine falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WARM_UP_ROUNDS = 2
L2_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and the quartiles of ``runs`` measured calls."""

    median: float
    low: float
    high: float
    runs: int


def interleaved(variants: Mapping[str, Callable[[], object]], device: str, budget_s: float = 3.0) -> dict[str, Timing]:
    """Time every variant once per round until the budget of seconds is spent (at least five rounds)."""
    clock = _CudaClock() if device == "cuda" else _HostClock()
    for _ in range(WARM_UP_ROUNDS):
        for call in variants.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    started = time.perf_counter()
    while time.perf_counter() - started < budget_s or len(next(iter(seconds.values()))) < 5:
        for name, call in variants.items():
            seconds[name].append(clock.measure(call))
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(seconds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4)
    return Timing(median, low, high, len(seconds))


def host_seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class _HostClock:
    def measure(self, call: Callable[[], object]) -> float:
        return host_seconds(call)


class _CudaClock:
    """Device time between two events, with the L2 cache flushed before each call."""

    def __init__(self) -> None:
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def measure(self, call: Callable[[], object]) -> float:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3
