"""States that are no parameters: they follow the optimizer's steps, and no gradient reaches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

Self = TypeVar("Self", bound="Float32Buffers")


@runtime_checkable
class FollowsSteps(Protocol):
    """A module that changes with the optimizer's steps. It keeps what a step's batches bring, and nothing it shows
    them changes before all have been read."""

    def after_step(self, applied: bool) -> None:
        """Called once per step, on all ranks; not `applied`: a gradient was not finite, and the step is forgotten."""


class Float32Buffers(nn.Module):
    """Keeps its buffers in float32 at least, whatever type the model is cast to: sums over many steps, which half
    precision would stop short of."""

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, cast in self._buffers.items():
            if cast is not None and cast.is_floating_point():
                self._buffers[name] = kept[name].to(cast.device, torch.promote_types(cast.dtype, torch.float32))
        return self


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """In place."""
    if num_ranks() > 1:
        dist.all_reduce(x)
    return x


def rows_of_ranks(x: Tensor) -> Tensor:
    """The rows of all ranks, in their order; each brings equally many."""
    if num_ranks() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(num_ranks())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
