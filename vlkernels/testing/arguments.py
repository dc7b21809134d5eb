"""Walk the arguments of a case: tensors wherever they stand, in layouts, masks, generators, biases, lists and tuples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import SegmentMask
from vlkernels.core.random import Rng
from vlkernels.ops.attention import RelativeBias


def map_tensors(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """A copy of ``value`` with every tensor replaced by ``move(tensor)``."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, (SegmentLayout, RelativeBias)):
        return value._with_tensors(move)
    if isinstance(value, Rng):
        moved = Rng.__new__(Rng)
        moved.state = move(value.state)
        return moved
    if isinstance(value, SegmentMask):
        return value.copy()
    if isinstance(value, dict):
        return {key: map_tensors(item, move) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, move) for item in value)
    return value


def differentiable_tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that require a gradient, by the path of the argument (``tables[1]``)."""
    return {name: t for name, t in _walk(arguments) if t.requires_grad}


def floating_outputs(output: Any) -> list[Tensor]:
    flat = output if isinstance(output, (tuple, list)) else (output,)
    return [t for t in flat if isinstance(t, Tensor) and t.is_floating_point()]


def integer_outputs(output: Any) -> list[Tensor]:
    flat = output if isinstance(output, (tuple, list)) else (output,)
    return [t for t in flat if isinstance(t, Tensor) and not t.is_floating_point()]


def cotangents(outputs: list[Tensor], seed: int = 7) -> list[Tensor]:
    """One seeded cotangent per output, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16) for t in outputs)
    return [d.to(t.device, t.dtype) for d, t in zip(drawn, outputs)]


def _walk(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, RelativeBias):
            yield from ((f"{name}.tables[{position}]", table) for position, table in enumerate(value.tables))
        elif isinstance(value, (list, tuple)):
            for position, item in enumerate(value):
                if isinstance(item, Tensor):
                    yield f"{name}[{position}]", item
