"""The CUDA kernels of layer_norm, run thread by thread on the CPU from the sources and by the plan of the launcher."""

import dataclasses

import pytest
import torch

import vlkernels as vk
from tests import emulated
from vlkernels.core.spec import Case
from vlkernels.ops.layer_norm.spec import SPECS
from vlkernels.testing import contract

pytestmark = pytest.mark.skipif(emulated.refusal() is not None, reason=str(emulated.refusal()))
SPEC = SPECS[0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    with emulated.serving(monkeypatch):
        yield emulated.layer_norm()
        emulated.layer_norm().run_in_order()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_contract(case, dtype):
    contract.verify(SPEC, case, dtype, "cuda")


def whole(rows, width):
    """Everything that can be fused, on so many rows."""

    def make(fill):
        return {
            "x": fill.normal(rows, width),
            "weight": fill.normal(width, dtype=torch.float32),
            "bias": fill.normal(width),
            "residual": fill.normal(rows, width),
            "linear_bias": fill.normal(width),
            "dropout_p": 0.1,
            "row_scale": fill.normal(rows, grad=False, dtype=torch.float32),
            "rng": fill.rng(),
            "stream": 2,
            "return_sum": True,
        }

    return Case(f"{rows} rows of {width}", make)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 768, 770, 1024, 2056, 4096, 4100, 8192, 16383, 16384])
def test_every_width(width, dtype):
    contract.verify(SPEC, whole(3 if width > 1024 else 13, width), dtype, "cuda")


@pytest.mark.parametrize("rows", [0, 1, 2, 31, 1087])
def test_any_number_of_rows(rows):
    contract.verify(SPEC, whole(rows, 24), torch.bfloat16, "cuda")
