"""The kernel of impl "triton" that the static report compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlkernels.core import similarity
from vlkernels.core.exchange import Block
from vlkernels.core.spec import Variant
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.sigmoid_loss.gpu import launches
from vlkernels.ops.sigmoid_loss.gpu.launches import Logits

# dtype, width, labels, gradient; the second line for the cards of the targets alone.
CALLS = ((torch.bfloat16, 512, False, True), (torch.float32, 512, False, True))
MORE_CALLS = ((torch.bfloat16, 512, True, True), (torch.bfloat16, 768, False, False))
TARGETS = (90, 100)


def variants(architecture: int) -> Iterator[Variant]:
    for dtype, width, labels, gradient in (*CALLS, *(MORE_CALLS if architecture in TARGETS else ())):
        facts = {"dtype": str(dtype).removeprefix("torch."), "width": width, "labels": labels, "gradient": gradient}
        yield Variant("pairs", facts, pairs_launch(dtype, width, labels, gradient, architecture))


def pairs_launch(
    dtype: torch.dtype, width: int, labels: bool, gradient: bool, architecture: int, rows: int = 300, columns: int = 300
) -> Launch:
    """The launch of a call, without data worth reading."""
    images, texts = (Block(torch.empty(length, width, dtype=dtype), 0) for length in (rows, columns))
    of_all = torch.empty(max(rows, columns), dtype=torch.int64) if labels else None
    wave = next(similarity.waves(rows, columns, images.features))
    sums = torch.empty(3, wave.programs(launches.tile_sizes(images, architecture)))
    logits = Logits(torch.empty(()), torch.empty(()), of_all)
    return launches.pairs_launch(logits, images, texts, wave, sums, gradient, architecture)
