"""The kernels of impl "triton" that the static report compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlkernels.core import similarity
from vlkernels.core.spec import Variant
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.contrastive_loss.gpu import launches

# dtype, width, labels of both sides, whether there are keys; the last ones for the cards of the targets alone.
CALLS = ((torch.bfloat16, 512, False, False), (torch.float32, 512, False, False))
MORE_CALLS = ((torch.bfloat16, 256, False, True), (torch.bfloat16, 512, True, False))
TARGETS = (90, 100)


def variants(architecture: int) -> Iterator[Variant]:
    for dtype, width, labels, keys in (*CALLS, *(MORE_CALLS if architecture in TARGETS else ())):
        facts = {"dtype": str(dtype).removeprefix("torch."), "width": width, "labels": labels, "keys": keys}
        for kernel, launch in call_launches(dtype, width, labels, keys, architecture).items():
            yield Variant(kernel, facts, launch)


def call_launches(
    dtype: torch.dtype, width: int, labels: bool, keys: bool, architecture: int, rows: int = 300, columns: int = 300
) -> dict[str, Launch]:
    """The kernels of a call, without data worth reading."""
    x, y = torch.empty(rows, width, dtype=dtype), torch.empty(columns, width, dtype=dtype)
    scale, of_rows, of_columns = torch.empty(()), torch.empty(rows), torch.empty(columns)
    of_labels = [torch.empty(length, dtype=torch.int64) for length in (rows, columns)] if labels else None
    visited = None if of_labels is None else tuple(of_labels)
    statistics, *_ = launches.statistics_launch(x, y, scale, visited, 0, not keys, architecture)
    wave = next(similarity.waves(rows, columns, x))
    if keys:
        weights = launches.weights_launch(x, y, scale, (of_rows, None), None, None, 0, 0.0, wave, None, architecture)
        return {"statistics": statistics, "weights": weights}
    softmax, weighed = ((of_rows, of_rows), (of_columns, of_columns)), None if visited is None else (*visited, of_columns)
    sums = torch.empty(launches.programs_of_a_wave(x, y, labels, architecture))
    weights = launches.weights_launch(x, y, scale, *softmax, weighed, 0, 2.0, wave, sums, architecture)
    return {"statistics": statistics, "weights": weights}
