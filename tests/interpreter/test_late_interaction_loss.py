"""vk.late_interaction_loss, impl="triton", interpreted with the tiles of sm_90: the contract, random lengths, blocks, ties."""

import dataclasses

import pytest
import torch

import vlkernels as vk
from vlkernels.core.spec import InputMaker
from vlkernels.ops.late_interaction_loss import spec
from vlkernels.testing import contract

SPEC = dataclasses.replace(spec.SPECS[0], deterministic=False)  # programs take turns: two runs prove nothing


@pytest.mark.parametrize("dtype", SPEC.dtypes)
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_contract(case, dtype):
    contract.verify(SPEC, case, dtype, "triton")
