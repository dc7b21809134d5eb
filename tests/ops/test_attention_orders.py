"""impl "cpp": the same bits for any packing order and when recomputed, the same draws for any split over ranks."""

import pytest
import torch

from tests.ops import attention_orders
from vlkernels.core import native


@pytest.mark.skipif(native.load() is not None, reason=str(native.load()))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_bits(dtype):
    attention_orders.verify("cpp", dtype)
