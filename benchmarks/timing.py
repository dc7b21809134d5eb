"""Side-by-side timing: variants take turns in one process, so noise of the machine falls on all of them alike."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

WARM_UP_ROUNDS = 2
FEWEST_ROUNDS = 5
FEWEST_LONG_ROUNDS = 3  # where one takes longer than the budget
L2_FLUSH_BYTES = 256 * 2**20
MOST_FLUSHES = 64

# What a variant is made of, in the order in which it runs: {"forward": ..., "backward": ...}.
Parts = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles of ``runs`` calls; on a card also ``host``: median until the call returned."""

    median: float
    low: float
    high: float
    runs: int
    host: float | None = None


class Reading(NamedTuple):
    seconds: float
    host: float | None


def interleaved(variants: Mapping[str, Callable[[], object]], device: str, budget_s: float = 3.0) -> dict[str, Timing]:
    """Time every variant once per round until the budget of seconds is spent: at least five rounds, three of long ones."""
    timings = interleaved_parts({name: {"call": call} for name, call in variants.items()}, device, budget_s)
    return {name: parts["call"] for name, parts in timings.items()}


def interleaved_parts(
    variants: Mapping[str, Parts], device: str, budget_s: float = 3.0, warm: bool = False
) -> dict[str, dict[str, Timing]]:
    """:func:`interleaved` of variants in parts: the timing of each, and of their sum as ``"total"``.

    ``warm``: all of them have run before, so that the first of some long rounds counts too.
    """
    clock = clock_of(device)

    def one_round() -> dict[str, list[Reading]]:
        return {name: [clock.measure((name, part), call) for part, call in parts.items()] for name, parts in variants.items()}

    rounds: list[dict[str, list[Reading]]] = []
    with _little_garbage():
        is_long = host_seconds(lambda: rounds.append(one_round())) > budget_s > 0
        if not (is_long and warm):
            rounds.clear()
        for _ in range(0 if is_long else WARM_UP_ROUNDS - 1):
            one_round()
        fewest = FEWEST_LONG_ROUNDS if is_long else FEWEST_ROUNDS
        started = time.perf_counter()
        while len(rounds) < fewest or time.perf_counter() - started < budget_s:
            rounds.append(one_round())
    return {name: _summaries(list(parts), [readings[name] for readings in rounds]) for name, parts in variants.items()}


@contextlib.contextmanager
def _little_garbage() -> Iterator[None]:
    """What was made before is not looked through again: a collection takes 0.2 s, from whoever happens to run."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _summaries(parts: list[str], rounds: list[list[Reading]]) -> dict[str, Timing]:
    timings = {part: summary([readings[i] for readings in rounds]) for i, part in enumerate(parts)}
    return {**timings, "total": summary([_sum(readings) for readings in rounds])}


def _sum(readings: list[Reading]) -> Reading:
    hosts = [reading.host for reading in readings if reading.host is not None]
    return Reading(sum(reading.seconds for reading in readings), sum(hosts) if hosts else None)


def summary(readings: list[Reading]) -> Timing:
    low, median, high = statistics.quantiles([reading.seconds for reading in readings], n=4)
    hosts = [reading.host for reading in readings if reading.host is not None]
    return Timing(median, low, high, len(readings), statistics.median(hosts) if hosts else None)


def host_seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def clock_of(device: str) -> HostClock | CudaClock:
    return CudaClock() if device == "cuda" else HostClock()


class HostClock:
    def measure(self, name: object, call: Callable[[], object]) -> Reading:
        return Reading(host_seconds(call), None)


class CudaClock:
    """Device time between two events, and the time until the call returned.

    Before a call the L2 cache is flushed, as often as the host took for this call last time: the device is still busy when the
    last kernel of the call is queued, so that its time holds no wait for the host.
    """

    def __init__(self, cuda: Any = torch.cuda, device: str = "cuda"):
        self._cuda = cuda
        self._memory = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._hosts: dict[object, float] = {}
        self._flush_seconds = 0.0
        for _ in range(3):
            self._flush_seconds = self._between(lambda: self._memory.zero_())[0]

    def measure(self, name: object, call: Callable[[], object]) -> Reading:
        flushes = min(MOST_FLUSHES, 1 + math.ceil(self._hosts.get(name, 0.0) / max(self._flush_seconds, 1e-6)))
        for _ in range(flushes):
            self._memory.zero_()
        seconds, host = self._between(call)
        self._hosts[name] = host
        return Reading(seconds, host)

    def _between(self, call: Callable[[], object]) -> tuple[float, float]:
        before, after = (self._cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        host = host_seconds(call)
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3, host
