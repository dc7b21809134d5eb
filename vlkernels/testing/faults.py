"""Faults to seed: a contract that stays green with one of these inside would prove nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.spec import Case, InputMaker, OpSpec
from vlkernels.testing.arguments import differentiable_tensors, floating_outputs, integer_outputs

Functional = Callable[..., Any]


def seeded(spec: OpSpec, case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Functional]]:
    """Every output and every gradient of the case with one wrong value, as (name, faulty functional)."""
    arguments = case.make(InputMaker(dtype))
    output = spec.functional(**arguments)
    for position in range(len(floating_outputs(output)) + len(integer_outputs(output))):
        yield f"output {position}", _wrong_output(spec.functional, position)
    if any(t.requires_grad for t in floating_outputs(output)):
        for name, tensor in differentiable_tensors(arguments).items():
            if tensor.numel():
                yield f"gradient of {name}", _wrong_gradient(spec.functional, name)


def _wrong_output(functional: Functional, position: int) -> Functional:
    def faulty(**arguments: Any) -> Any:
        output = functional(**arguments)
        if not isinstance(output, tuple):
            return _spoil(output)
        return tuple(_spoil(t) if i == position else t for i, t in enumerate(output))

    return faulty


def _wrong_gradient(functional: Functional, name: str) -> Functional:
    argument, _, rest = name.partition("[")

    def faulty(**arguments: Any) -> Any:
        value = arguments[argument]
        tensor = value[int(rest[:-1])] if rest else value
        tensor.register_hook(_spoil)
        return functional(**arguments)

    return faulty


def _spoil(tensor: Tensor) -> Tensor:
    """The same tensor with its last finite value wrong by a tenth of the largest (or by one, for integers)."""
    finite = tensor.detach().isfinite().flatten().nonzero().flatten()
    if not finite.numel():
        return tensor
    wrong = torch.zeros_like(tensor.detach()).flatten()
    size = tensor.detach()[tensor.detach().isfinite()].abs().max()
    wrong[finite[-1]] = 1 if not tensor.is_floating_point() else torch.clamp(0.1 * size, min=0.1)
    return tensor + wrong.view(tensor.shape)
