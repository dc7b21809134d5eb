"""Models of transformers under ``attn_implementation="vlkernels"`` equal themselves under sdpa."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlkernels as vk
from tests.integrations.comparing import assert_same, attention_calls, cast, floats, gradients
from tests.integrations.tiny_models import CASES, Case, redrawn
from vlkernels.testing import error_rule


@pytest.fixture(autouse=True, scope="module")
def registered():
    vk.integrations.transformers.register()


def read(case: Case, output: Any) -> dict[str, Tensor]:
    """The floating outputs; rows of padding under a causal mask set to 0, because nobody reads them."""
    found = floats(output)
    if case.real is not None:
        real = case.real().bool()
        for name, value in found.items():
            if value.shape[:2] == real.shape:
                found[name] = value.masked_fill(~real[..., None], 0.0)
    assert found
    return found


def run(case: Case, model: nn.Module, implementation: str) -> tuple[dict[str, Tensor], list[str]]:
    model.set_attn_implementation(implementation)
    with vk.recorded() as served:
        return read(case, model(**cast(case.inputs(), model.dtype))), attention_calls(served)


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
    assert_same(actual, expected)
    assert_same(gradients(model, actual), expected_gradients)


def test_there_are_enough_model_classes():
    assert len({type(case.build()).__name__ for case in CASES}) >= 22
