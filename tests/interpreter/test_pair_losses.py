"""vk.sigmoid_loss and vk.triplet_loss, impl="triton", interpreted with the tiles of sm_90: the contract and what is special."""

import dataclasses

import pytest
import torch

from vlkernels.core.spec import Case
from vlkernels.ops.sigmoid_loss import spec as sigmoid
from vlkernels.ops.triplet_loss import spec as triplet
from vlkernels.testing import contract

# Programs take turns: two runs prove nothing.
SPECS = {spec.name: dataclasses.replace(spec, deterministic=False) for spec in (*sigmoid.SPECS, *triplet.SPECS)}
CALLS = [
    (spec.name, case, dtype)
    for spec in SPECS.values()
    for case in spec.cases
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("op, case, dtype", CALLS, ids=lambda x: x.name if isinstance(x, Case) else str(x))
def test_contract(op, case, dtype):
    contract.verify(SPECS[op], case, dtype, "triton")
