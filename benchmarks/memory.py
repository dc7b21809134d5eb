"""The most bytes that one forward and backward hold at once on a CPU.

A process of its own per variant: what one leaves in the heap would hide what the next one needs. All are forked from one that
has imported everything and has computed nothing.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.variants import only_variant

PROCESS = Path("/proc/self")
MAPPED_ALONE_FROM = 1 << 16  # bytes; such blocks go back to the system as soon as they are freed
_MMAP_THRESHOLD = -3  # glibc's malloc.h


def peak_bytes(op: str, benchmark: str, dtype: str, variant: str) -> int | None:
    """Beside what is there before, inputs included; ``None`` where the system does not tell."""
    if not (PROCESS / "clear_refs").exists():
        return None
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["benchmarks.memory"])
    with ProcessPoolExecutor(1, server) as processes:
        return processes.submit(_measure, op, benchmark, dtype, variant).result()


def _measure(op: str, benchmark: str, dtype: str, variant: str) -> int:
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, MAPPED_ALONE_FROM)
    step = only_variant(op, benchmark, dtype, variant)
    return most_held(lambda: [part() for part in step.parts().values()])


def most_held(work: Callable[[], object]) -> int:
    """The most memory that ``work()`` holds beside what this process holds now."""
    (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def give_back() -> None:
    """Return to the system what the heap holds free: what one op has used does not stay with the next."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.MULTILINE)
    assert found, f"the system's status of a process has no {name}"
    return int(found[1]) * 1024
