"""The mask table of every published system, interpreted with the tiles of sm_90: awkward batches, head widths, dtypes."""

import pytest
import torch

from tests.ops import attention_orders
from tests.ops import attention_systems as systems
from vlkernels.core.spec import Case


@pytest.mark.parametrize("batch", systems.BATCHES)
@pytest.mark.parametrize("table, make", systems.TABLES, ids=systems.NAMES)
def test_tables(table, make, batch):
    systems.verify(make(table, batch), torch.float32, "triton")


@pytest.mark.parametrize("width, dtype", systems.HEADS)
def test_head_widths(width, dtype):
    for options in ({}, {"dropout_p": 0.1}, {"heads": (2, 1)}):
        case = systems.self_case(systems.SELF["SimVLM, BLIP-2 captions: image, text"], "primes", width, **options)
        systems.verify(case, dtype, "triton")


def test_a_thousand_samples():
    systems.verify(Case("a thousand samples", systems.thousand_samples), torch.bfloat16, "triton")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_packing_order_and_recomputation_change_no_bit_and_ranks_no_draw(dtype):
    attention_orders.verify("triton", dtype)
