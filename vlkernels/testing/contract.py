"""The contract every op must pass: values, gradients, determinism, and the implementation that was asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import dispatch
from vlkernels.core.spec import Case, InputMaker, OpSpec
from vlkernels.testing.arguments import cotangents, differentiable_tensors, floating_outputs, integer_outputs
from vlkernels.testing.error_rule import assert_close


@dataclass
class Results:
    """What a call returned and the gradients it gave, by the name of the argument."""

    floating: list[Tensor]
    integer: list[Tensor]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        outputs = {f"output {i}": t for i, t in enumerate(self.floating)}
        return outputs | {f"gradient of {name}": t for name, t in self.gradients.items()}


def verify(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: str = "cpu",
    functional: Callable[..., Any] | None = None,
) -> None:
    """Raise ``AssertionError`` unless ``impl`` obeys the error rule on ``case``, is the code that ran, and repeats itself."""
    functional = functional or spec.functional
    truth = run(spec.reference, case, torch.float64, device)
    eager = run(spec.reference, case, dtype, device)
    with dispatch.recorded() as served, poisoned_memory():
        actual = run(functional, case, dtype, device, impl=impl)
    assert (spec.name, impl) in served, f"{spec.name}: asked for {impl}, served by {served}"
    compare(f"{spec.name}/{case.name}/{impl}", actual, eager, truth)
    if spec.deterministic:
        again = run(functional, case, dtype, device, impl=impl)
        for name, tensor in actual.named().items():
            assert torch.equal(tensor.nan_to_num(), again.named()[name].nan_to_num()), f"{name} differs between two runs"


def run(function: Callable[..., Any], case: Case, dtype: torch.dtype, device: str = "cpu", **options: Any) -> Results:
    """Call ``function`` on the inputs of ``case`` and differentiate it along seeded cotangents."""
    arguments = case.make(InputMaker(dtype, device))
    output = function(**arguments, **options)
    floating = floating_outputs(output)
    traced = [t for t in floating if t.requires_grad]
    inputs = differentiable_tensors(arguments)
    gradients: dict[str, Tensor] = {}
    if traced and inputs:
        found = torch.autograd.grad(traced, list(inputs.values()), cotangents(traced), allow_unused=True)
        gradients = {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(inputs.items(), found)}
    return Results([t.detach() for t in floating], integer_outputs(output), gradients)


def compare(name: str, actual: Results, eager: Results, truth: Results) -> None:
    assert len(actual.floating) == len(truth.floating), f"{name}: {len(actual.floating)} outputs, expected {len(truth.floating)}"
    assert actual.gradients.keys() == truth.gradients.keys(), f"{name}: gradients of {sorted(actual.gradients)}"
    for position, (mine, true) in enumerate(zip(actual.integer, truth.integer, strict=True)):
        assert torch.equal(mine.cpu(), true.cpu()), f"{name}: integer output {position} differs from the reference"
    eager_values, true_values = eager.named(), truth.named()
    for part, tensor in actual.named().items():
        assert_close(f"{name}: {part}", tensor, eager_values[part], true_values[part])


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN inside the block, so a value that was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def implementations_here(spec: OpSpec, case: Case, dtype: torch.dtype, device: str = "cpu") -> list[str]:
    """The implementations that serve this case on this machine, the reference aside."""
    names = [i.name for i in spec.implementations if i.refusal_on(device) is None]
    return [name for name in names if name != "reference" and _serves(spec, case, dtype, device, name)]


def _serves(spec: OpSpec, case: Case, dtype: torch.dtype, device: str, impl: str) -> bool:
    try:
        spec.functional(**case.make(InputMaker(dtype, device)), impl=impl)
    except ValueError as error:
        if "cannot run with impl" in str(error):
            return False
        raise
    return True
