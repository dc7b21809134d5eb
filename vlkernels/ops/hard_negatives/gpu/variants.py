"""The kernels of impl "triton" that the static report compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlkernels.core.spec import Variant
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.hard_negatives.gpu.launches import Span, block_launch, block_size, choose_launch

PAIRS, WIDTH = 4096, 256


def variants(architecture: int) -> Iterator[Variant]:
    for kernel, launch in launches(torch.bfloat16, architecture).items():
        facts = {"dtype": "bfloat16", "width": WIDTH, "labels": True}
        yield Variant(kernel, facts if kernel == "block" else facts | {"products": False}, launch)


def launches(dtype: torch.dtype, architecture: int) -> dict[str, Launch]:
    """The kernels of a call with labels, without data worth reading."""
    features = torch.empty(PAIRS, WIDTH, dtype=dtype)
    span = Span(features, features, torch.empty(PAIRS, dtype=torch.int64), torch.empty(()), 0)
    block_lse = torch.empty(PAIRS, -(-PAIRS // block_size(features, architecture)))
    block, chosen = torch.empty(2, PAIRS, 1, dtype=torch.int64).unbind()
    of_block, threshold = torch.empty(2, PAIRS, 1).unbind()
    return {
        "block": block_launch(span, block_lse, architecture),
        "choose": choose_launch(span, block, of_block, threshold, chosen, architecture),
    }
