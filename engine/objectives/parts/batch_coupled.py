"""Objectives whose loss is over all pairs of an optimizer step, however few of them are in memory at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.objectives.parts.objective import Losses, Objective, Report
from engine.sections import require


@dataclass(frozen=True)
class Features:
    """What such a loss reads of one batch, or of several put together."""

    rows: dict[str, Tensor]
    """Tensors whose rows belong to the batch (features of pairs, packed tokens, labels): those of several batches lie
    one behind the other."""
    numbers: dict[str, Tensor]
    """What all batches of a step share: parameters, such as the scale of similarities, as the loss uses them."""
    bounds: dict[str, int] = field(default_factory=dict)
    """What the host knows of the rows without waiting for the device, such as the length of the longest sample: that of
    several batches is the largest of theirs."""

    @classmethod
    def together(cls, parts: Sequence[Features]) -> Features:
        """Those of all batches, as inputs of a graph of their own."""
        first = parts[0]
        rows = {name: torch.cat([part.rows[name] for part in parts]) for name in first.rows}
        return cls(
            {name: _as_input(tensor) for name, tensor in rows.items()},
            {name: _as_input(tensor) for name, tensor in first.numbers.items()},
            {name: max(part.bounds[name] for part in parts) for name in first.bounds},
        )

    def differentiable(self) -> tuple[list[Tensor], list[Tensor]]:
        """Rows and numbers that a loss has gradients for, in a fixed order."""
        rows = [tensor for tensor in self.rows.values() if tensor.is_floating_point()]
        return rows, list(self.numbers.values())


def _as_input(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if tensor.dtype == torch.float16:
        tensor = tensor.float()  # gradients too small for float16: DeepSpeed scales losses in the second pass alone
    return tensor.detach().requires_grad_()


@dataclass
class BatchCoupledObjective(Objective):
    """An objective in two parts: what it needs of a batch, and how its loss follows from that of all batches.

    On its own it is an objective like any other, over one batch. With several micro-batches per step the trainer calls
    the parts, and keeps no activations between them.
    """

    def check(self, config: Any) -> None:
        super().check(config)
        require_negatives(config)

    def features(self, model: Any, batch: Batch) -> Features:
        """What the loss reads of a batch; called inside the forward that DeepSpeed wraps."""
        raise NotImplementedError

    def loss(self, features: Features, impl: str) -> tuple[Losses, Report]:
        """Named losses of this rank and a report. It is called outside of that forward, so it sees no model."""
        raise NotImplementedError

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Losses, Report]:
        return self.loss(self.features(model, batch), model.impl)


def require_negatives(config: Any) -> None:
    """Refuse steps of a single pair."""
    pairs = config.train.global_batch
    require(pairs >= 2, f"train.global_batch must be at least 2, so that pairs have negatives, got {pairs}")


@dataclass(frozen=True)
class StepLoss:
    """A loss over the whole step, as one of its micro-batches meets it: the value and the gradients are known."""

    named: Losses
    report: Report
    gradients: list[Tensor | None]
    """By what `Features.differentiable` gives of this micro-batch."""
    factors: list[int]
    """On each of them. A micro-step's loss counts as one part of the step: so rows, which one micro-batch has, are
    multiplied by the number of parts, and numbers, which all of them have, are not. Each gradient arrives once."""

    @classmethod
    def over(cls, objective: BatchCoupledObjective, parts: Sequence[Features], impl: str) -> list[StepLoss]:
        """The loss over all parts, for each of them."""
        whole = Features.together(parts)
        named, report = objective.loss(whole, impl)
        rows, numbers = whole.differentiable()
        of_rows, of_numbers = _gradients(sum(named.values()), rows, numbers)
        sizes = zip(*([len(tensor) for tensor in part.differentiable()[0]] for part in parts), strict=True)
        cut = [_split(gradient, counts) for gradient, counts in zip(of_rows, sizes, strict=True)]
        values = {name: value.detach() for name, value in named.items()}
        factors = [len(parts)] * len(rows) + [1] * len(numbers)
        own_rows = zip(*cut, strict=True)
        return [cls(values, report, [*own, *of_numbers], factors) for own in own_rows]

    def at(self, features: Features) -> Tensor:
        """The loss, with its gradients by the features of this micro-batch."""
        rows, numbers = features.differentiable()
        return _GradientsKnown.apply(sum(self.named.values()), self.gradients, self.factors, *rows, *numbers)


def _gradients(loss: Tensor, rows: list[Tensor], numbers: list[Tensor]) -> tuple[Sequence[Tensor | None], ...]:
    gradients = torch.autograd.grad(loss, [*rows, *numbers], allow_unused=True)
    return gradients[: len(rows)], gradients[len(rows) :]


def _split(gradient: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if gradient is None else gradient.split(sizes)


class _GradientsKnown(torch.autograd.Function):
    """A value, and gradients that were found elsewhere."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], factors: list[int], *inputs: Tensor) -> Tensor:
        ctx.gradients, ctx.factors, ctx.dtypes = gradients, factors, [tensor.dtype for tensor in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        known = zip(ctx.gradients, ctx.factors, ctx.dtypes, strict=True)
        scaled = (None if g is None else (grad * factor * g).to(dtype) for g, factor, dtype in known)
        return None, None, None, *scaled
