"""Which implementation of an op serves a call: an argument, resolved before the op runs, and reported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

IMPLEMENTATION_NAMES = ("reference", "torch", "cpp", "triton", "cuda", "flash")

Facts = Mapping[str, Any]


def _always(*_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        name: one of :data:`IMPLEMENTATION_NAMES`.
        devices: device types it runs on.
        available: ``None``, or why it cannot run on this machine.
        supports: ``None``, or why it cannot serve a call with these facts (dtype, widths, options).
        on_request: device types on which it serves only when asked for by name.
    """

    name: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    available: Callable[[], str | None] = _always
    supports: Callable[[Facts], str | None] = _always
    on_request: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.name in IMPLEMENTATION_NAMES, self.name

    def refusal(self, device_type: str, facts: Facts) -> str | None:
        """Why this implementation cannot serve the call; ``None`` when it can."""
        return self.refusal_on(device_type) or self.supports(facts)

    def refusal_on(self, device_type: str) -> str | None:
        """Why this implementation cannot run on this kind of device here; ``None`` when it can."""
        if device_type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, the inputs are on {device_type}"
        return self.available()


_recorders: list[list[tuple[str, str]]] = []


def resolve(
    op: str,
    impl: str,
    implementations: Sequence[Implementation],
    device: torch.device,
    facts: Facts | None = None,
) -> str:
    """The name of the implementation that serves: the first of ``implementations`` that can, or the one asked for."""
    chosen = _choose(op, impl, implementations, _device_type(device), facts or {})
    if _recorders and not torch.compiler.is_compiling():  # a graph that wrote to a recorder would be traced again for the next one
        for served in _recorders:
            served.append((op, chosen))
    return chosen


def _device_type(device: torch.device) -> str:
    """Meta tensors stand for a device's: shapes alone, and no value to look at."""
    return "cuda" if device.type == "meta" else device.type


def _choose(op: str, impl: str, implementations: Sequence[Implementation], device_type: str, facts: Facts) -> str:
    if impl == "auto":
        for candidate in implementations:
            if device_type not in candidate.on_request and candidate.refusal(device_type, facts) is None:
                return candidate.name
        raise ValueError(f"{op} has no implementation for these inputs on {device_type}")
    for candidate in implementations:
        if candidate.name == impl:
            reason = candidate.refusal(device_type, facts)
            if reason is not None:
                raise ValueError(f'{op} cannot run with impl="{impl}": {reason}')
            return impl
    names = ", ".join(f'"{i.name}"' for i in implementations)
    raise ValueError(f'impl must be "auto" or one of {names} for {op}, got "{impl}"')


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """Collect ``(op, implementation)`` of every call resolved inside the block."""
    served: list[tuple[str, str]] = []
    _recorders.append(served)
    try:
        yield served
    finally:
        _recorders[:] = [recorder for recorder in _recorders if recorder is not served]
