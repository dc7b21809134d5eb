"""How many kernels a call launches on a card, counted by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Parts


def launches(parts: Parts) -> dict[str, int] | None:
    """By part, which run once, in their order; ``None`` where the profiler sees no kernel at all."""
    found = {}
    for name, call in parts.items():
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        found[name] = kernels(seen.events())
    return found if any(found.values()) else None


def kernels(events: Iterable[Any]) -> int:
    """Copies and fills of memory are no kernels."""
    on_card = [event.name for event in events if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_card)
