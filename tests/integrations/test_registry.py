"""Models of transformers under ``attn_implementation="vlkernels"`` equal themselves under sdpa."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlkernels as vk
from tests.integrations.tiny_models import CASES, Case, redrawn
from vlkernels.testing import error_rule


@pytest.fixture(autouse=True, scope="module")
def registered():
    vk.integrations.transformers.register()


def attention_calls(served: list[tuple[str, str]]) -> list[str]:
    return [impl for op, impl in served if op.startswith("attention")]


def floats(case: Case, output: Any) -> dict[str, Tensor]:
    """The floating outputs; rows of padding under a causal mask set to 0, because nobody reads them."""
    found = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}
    if case.real is not None:
        real = case.real().bool()
        for name, value in found.items():
            if value.shape[:2] == real.shape:
                found[name] = value.masked_fill(~real[..., None], 0.0)
    assert found
    return found


def run(case: Case, model: nn.Module, implementation: str) -> tuple[dict[str, Tensor], list[str]]:
    model.set_attn_implementation(implementation)
    inputs = {k: v.to(model.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.inputs().items()}
    with vk.recorded() as served:
        return floats(case, model(**inputs)), attention_calls(served)


def gradients(model: nn.Module, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    model.zero_grad()
    differentiable = [value for value in outputs.values() if value.requires_grad]
    sum((value * torch.randn(value.shape, generator=generator)).sum() for value in differentiable).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_obey_the_error_rule_in_float32(case):
    model = redrawn(case.build())
    with torch.no_grad():
        eager, none = run(case, model, case.against)
        actual, calls = run(case, model, "vlkernels")
        truth, _ = run(case, model.double(), case.against)
    assert none == [] and len(calls) == case.calls
    for name, value in actual.items():
        error_rule.assert_close(name, value, eager[name], truth[name])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_parameter_gradients_are_the_same_in_float64(case):
    model = redrawn(case.build()).double()
    expected, _ = run(case, model, case.against)
    expected_gradients = gradients(model, expected)
    actual, calls = run(case, model, "vlkernels")
    assert len(calls) == case.calls
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    found = gradients(model, actual)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        scale = max(1.0, float(expected_gradients[name].abs().max()))
        torch.testing.assert_close(gradient / scale, expected_gradients[name] / scale, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_there_are_enough_model_classes():
    assert len({type(case.build()).__name__ for case in CASES}) >= 22
