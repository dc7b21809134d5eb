"""Argument checks that name the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.int64, torch.int32)


def check_shape(name: str, tensor: Tensor, symbols: str, expected: Sequence[int | None]) -> None:
    """Raise unless ``tensor`` has the expected shape; ``None`` stands for any length of that dimension."""
    shape = tuple(tensor.shape)
    if len(shape) == len(expected) and all(e is None or s == e for s, e in zip(shape, expected)):
        return
    wanted = ", ".join("any" if e is None else str(e) for e in expected)
    raise ValueError(f"{name} must be {symbols} = [{wanted}], got {list(shape)}")


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a Tensor, got a {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} must be {listed(allowed)}, got {str(tensor.dtype).removeprefix('torch.')}")


def listed(dtypes: Sequence[torch.dtype]) -> str:
    """``float32``, or ``one of float32, bfloat16``."""
    names = [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes)]
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def check_floating(name: str, tensor: Tensor) -> None:
    check_dtype(name, tensor, FLOATING_DTYPES)


def check_integer(name: str, tensor: Tensor) -> None:
    check_dtype(name, tensor, INTEGER_DTYPES)


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise unless all tensors that are given lie on one device."""
    present = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(present.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"all tensors must be on one device, got {listed}")


def check_probability(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def check_values_between(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Check ``low <= tensor < high``: at once on the CPU, by a device-side assertion (no sync) elsewhere."""
    if torch.compiler.is_compiling() or tensor.numel() == 0:
        return
    if tensor.device.type == "cpu":
        smallest, largest = int(tensor.min()), int(tensor.max())
        if smallest < low or largest >= high:
            raise ValueError(f"{name} must lie in [{low}, {high}), got values from {smallest} to {largest}")
    else:
        torch._assert_async(((tensor >= low) & (tensor < high)).all())
