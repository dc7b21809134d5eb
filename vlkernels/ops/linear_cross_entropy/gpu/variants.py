"""The kernels of impl "triton" that the static report compiles: an MLM head, and one with a teacher."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlkernels.core import similarity
from vlkernels.core.spec import Variant
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.linear_cross_entropy.call import Call
from vlkernels.ops.linear_cross_entropy.gpu import launches as host

ROWS, ENTRIES = 1030, 30522
CALLS = ((torch.bfloat16, 768, False),)
MORE_CALLS = ((torch.bfloat16, 768, True), (torch.float32, 768, False))  # for the cards of the targets
TARGETS = (90, 100)


def variants(architecture: int) -> Iterator[Variant]:
    for dtype, width, is_taught in (*CALLS, *(MORE_CALLS if architecture in TARGETS else ())):
        facts = {"dtype": str(dtype).removeprefix("torch."), "width": width, "teacher": is_taught}
        for kernel, launch in launches(dtype, width, is_taught, architecture).items():
            if kernel != "losses":
                yield Variant(kernel, facts, launch)
            elif is_taught:  # whatever the dtype of the rows, it reads float32
                yield Variant(kernel, {**facts, "dtype": "float32"}, launch)


def launches(dtype: torch.dtype, width: int, is_taught: bool, architecture: int, rows: int = ROWS) -> dict[str, Launch]:
    """The kernels of both passes of a call with a bias, without data worth reading."""
    hidden, weight = torch.empty(rows, width, dtype=dtype), torch.empty(ENTRIES, width, dtype=dtype)
    bias, targets = torch.empty(ENTRIES, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    teacher = (hidden, weight, bias) if is_taught else (None, None, None)
    call = Call(hidden, weight, bias, targets, *teacher, -100, 0.0, 0.0, 0.5 if is_taught else 0.0, 1.0)
    live = host.LiveRows.of(call)
    statistics, ends = host.new_statistics(call, live, architecture)
    wave = next(similarity.waves(rows, ENTRIES, hidden))
    sums = host.new_bias_sums(call, wave.weights.shape[0], architecture)
    return {
        "statistics": host.statistics_launch(call, live, statistics, architecture),
        "losses": host.losses_launch(call, live, statistics, torch.empty(rows), ends),
        "slopes": host.slopes_launch(call, live, ends, None, wave, sums, architecture),
    }
