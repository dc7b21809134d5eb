"""Replacing modules of a live model by changing their class: parameters, buffers, hooks and the state dict stay as they are."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

ORIGINAL = "_swapped_from"


@dataclass(frozen=True)
class Swapped:
    """A module that has a new class."""

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class Left:
    """A module that keeps its class, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a swap did; ``print`` it."""

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, left {len(self.left)}"]
        pairs = Counter((s.old, s.new) for s in self.swapped)
        lines += [f"  {count} x {old} -> {new}" for (old, new), count in pairs.items()]
        reasons: dict[tuple[str, str], list[str]] = {}
        for left in self.left:
            reasons.setdefault((left.kind, left.reason), []).append(left.name or "the model itself")
        for (kind, reason), names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  left {kind} ({names[0]}{more}): {reason}")
        return "\n".join(lines)


def swap(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> Report:
    """Give every module whose type is exactly a key of ``classes`` the class it maps to, in place.

    Example::

        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> print(vk.swap(model, {nn.LayerNorm: vk.FusedLayerNorm}))
        swapped 1, left 0
          1 x LayerNorm -> FusedLayerNorm

    The new class must be a subclass of the old one with the old one's ``__init__``: then it has every parameter, and nothing
    that only its own constructor would make. Modules of other subclasses of a key, and those whose ``forward`` was replaced
    on the instance, where a new class would change nothing, are left and told. :func:`unswap` restores the classes.
    """
    _check_kinds(model, classes)
    for old, new in classes.items():
        _check_pair(old, new)
    swapped, left = [], []
    for name, module in model.named_modules():
        kind = type(module)
        old = kind if kind in classes else next((c for c in classes if isinstance(module, c)), None)
        if old is None:
            continue
        reason = "it has its new class already" if kind is classes[old] else why_not(module, old)
        if reason is None:
            change_class(module, classes[old])
            swapped.append(Swapped(name, old.__name__, classes[old].__name__))
        else:
            left.append(Left(name, kind.__name__, reason))
    return Report(tuple(swapped), tuple(left))


def unswap(model: nn.Module) -> int:
    """Give every module that was swapped its class back; how many there were."""
    swapped = [module for module in model.modules() if ORIGINAL in vars(module)]
    for module in swapped:
        module.__class__ = vars(module).pop(ORIGINAL)
    return len(swapped)


def why_not(module: nn.Module, old: type[nn.Module]) -> str | None:
    """Why a module cannot take over another class than ``old``; ``None`` when it can."""
    if type(module) is not old:
        return f"it is a {type(module).__name__}, a subclass of {old.__name__} with ways of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the instance: a new class would change nothing"
    return None


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    vars(module).setdefault(ORIGINAL, type(module))
    module.__class__ = new


def _check_kinds(model: Any, classes: Any) -> None:
    for name, value, kind in (("model", model, nn.Module), ("classes", classes, Mapping)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got a {type(value).__name__}")


def _check_pair(old: type[nn.Module], new: type[nn.Module]) -> None:
    for role, kind in (("old", old), ("new", new)):
        if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
            raise ValueError(f"classes must map module classes to module classes, got the {role} one {kind!r}")
    if new is old or not issubclass(new, old):
        raise ValueError(f"{new.__name__} cannot replace {old.__name__}: it must be a subclass of it")
    if new.__init__ is not old.__init__:
        raise ValueError(f"{new.__name__} cannot replace {old.__name__}: its own __init__ may make what a live module lacks")
