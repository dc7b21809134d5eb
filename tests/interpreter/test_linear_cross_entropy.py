"""Linear cross-entropy, impl="triton", interpreted with the tiles of sm_90: the contract, ragged sizes, waves, mutants."""

import dataclasses

import pytest
import torch

from vlkernels.ops.linear_cross_entropy.spec import SPECS
from vlkernels.testing import contract

SPEC = dataclasses.replace(SPECS[0], deterministic=False)  # programs take turns: two runs prove nothing
CASES = {case.name: case for case in SPEC.cases}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_contract(name, dtype):
    contract.verify(SPEC, CASES[name], dtype, "triton")
