"""Momentum copies of a model's parts, and queues of the features they made (MoCo; ALBEF, BLIP)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.states import rows_of_ranks
from engine.sections import require


class MomentumCopy(nn.Module):
    """A module with weights of its own that follow those of `source` slowly: after every step, hence before the
    next one's forward, `copy = momentum * copy + (1 - momentum) * source`.

    It has no gradients and stays in evaluation mode. With momentum 1 it stands still: a frozen teacher. The update is
    the trainer's (`engine/training/averages.py`): under ZeRO-3 a rank moves the shards it holds.
    """

    def __init__(self, source: nn.Module, momentum: float):
        super().__init__()
        require(0.0 <= momentum <= 1.0, f"momentum of a copy must be in [0, 1], got {momentum}")
        states = (getattr(module, "rng", None) for module in source.modules())
        shared = {id(rng): rng for rng in states if isinstance(rng, vk.Rng)}  # advanced once, for model and copy
        self.module = copy.deepcopy(source, shared).requires_grad_(False)
        self.momentum = momentum
        self._source = (source,)  # in a tuple: its parameters are not this module's
        self.eval()

    def train(self, mode: bool = True) -> MomentumCopy:
        return super().train(False)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        with torch.no_grad():
            return self.module(*inputs, **options)

    def parameter_pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Each parameter of the copy, and the one that it follows."""
        followed = dict(self._source[0].named_parameters())
        for name, parameter in self.module.named_parameters():
            yield parameter, followed[name]

    def buffer_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        followed = dict(self._source[0].named_buffers())
        for name, buffer in self.module.named_buffers():
            yield buffer, followed[name]

    @torch.no_grad()
    def begin(self) -> None:
        """Take the source's weights as they are: what was loaded into it after the copy was made."""
        for own, followed in (*self.parameter_pairs(), *self.buffer_pairs()):
            own.copy_(followed)


class FeatureQueue(nn.Module):
    """The newest `length` features of earlier steps, the same on all ranks: more negatives than a batch has.

    Before it is full, random directions stand for what is missing. A step's features replace the oldest after the step.
    """

    features: Tensor
    next_row: Tensor

    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("features", F.normalize(torch.randn(length, width), dim=-1))
        self.register_buffer("next_row", torch.zeros(1, dtype=torch.int64))
        self._pushed: list[Tensor] = []

    def push(self, features: Tensor) -> None:
        """The features `[B, width]` of a micro-batch of this rank, once per micro-batch. Nothing in evaluation."""
        if self.training:
            self._pushed.append(features.detach().to(self.features.dtype))

    @torch.no_grad()
    def after_step(self, applied: bool) -> None:
        pushed, self._pushed = self._pushed, []
        if not applied or not pushed:
            return
        new = torch.cat([rows_of_ranks(part) for part in pushed])
        require_whole_turns("the queue", len(self.features), len(new))
        rows = self.next_row + torch.arange(len(new), device=new.device)
        self.features.index_copy_(0, rows, new)
        self.next_row.add_(len(new)).remainder_(len(self.features))


def require_whole_turns(name: str, length: int, global_batch: int) -> None:
    """A step's features must not be cut at the end of the queue."""
    require(
        length % global_batch == 0,
        f"{name} must hold a whole number of global batches: {length} features, {global_batch} pairs per step",
    )
