"""The kernels of impl "triton" that the static report compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlkernels.core import similarity
from vlkernels.core.exchange import Block
from vlkernels.core.spec import Variant
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.triplet_loss.gpu import launches

# dtype, width, labels; the second line for the cards of the targets alone.
CALLS = ((torch.bfloat16, 512, False), (torch.float32, 512, False))
MORE_CALLS = ((torch.bfloat16, 1024, True),)
TARGETS = (90, 100)


def variants(architecture: int) -> Iterator[Variant]:
    for dtype, width, labels in (*CALLS, *(MORE_CALLS if architecture in TARGETS else ())):
        facts = {"dtype": str(dtype).removeprefix("torch."), "width": width, "labels": labels}
        for kernel, launch in call_launches(dtype, width, labels, architecture).items():
            yield Variant(kernel, facts, launch)


def call_launches(
    dtype: torch.dtype, width: int, labels: bool, architecture: int, rows: int = 300, columns: int = 300
) -> dict[str, Launch]:
    """The launches of a call in either form that meet all pairs, without data worth reading."""
    images, texts = (Block(torch.empty(length, width, dtype=dtype), 0) for length in (rows, columns))
    longest = max(rows, columns)
    of_all = torch.empty(longest, dtype=torch.int64) if labels else None
    wave = next(similarity.waves(rows, columns, images.features))
    ranks, pushes = (tuple(torch.empty(n, dtype=d) for n in (rows, columns)) for d in (torch.int64, torch.int32))
    sums = torch.empty(wave.programs(launches.tile_sizes(images, architecture)))
    return {
        "hardest": launches.hardest_launch(images, texts, of_all, ranks, architecture),
        "exceeding": launches.exceeding_launch(
            images, texts, of_all, torch.empty(longest), wave, pushes, sums, True, architecture
        ),
    }
