"""What ``patchify`` is timed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.peers import compiled, loaded, rival
from vlkernels.core.spec import Arguments, Benchmark, Cost, InputMaker
from vlkernels.ops.patchify import functional, peers

BATCH, SIDE, PATCH = 32, 224, 16
CARD_BATCH = 256


def cost(images: Tensor, layout: SegmentLayout, patch_size: int, sizes: Tensor | None = None) -> Cost:
    """Every pixel of a patch is read and written once; the backward also writes the other pixels' zeros."""
    moved = layout.num_tokens * images.shape[1] * patch_size**2 * images.element_size()
    return Cost(forward_bytes=2 * moved, backward_bytes=moved + images.numel() * images.element_size())


def patches_of(sizes: Sequence[Sequence[int]], patch_size: int) -> list[int]:
    return [(height // patch_size) * (width // patch_size) for height, width in sizes]


def _equal(fill: InputMaker, batch: int, draw: Callable[..., Tensor]) -> Arguments:
    layout = fill.layout([[(SIDE // PATCH) ** 2]] * batch)
    return {"images": draw(batch, 3, SIDE, SIDE), "layout": layout, "patch_size": PATCH}


def _native(fill: InputMaker, batch: int, draw: Callable[..., Tensor]) -> Arguments:
    """Sides between half the longest and the longest."""
    sizes = fill.integers(SIDE // 2, SIDE + 1, (batch, 2))
    layout = fill.layout([[n] for n in patches_of(sizes.tolist(), PATCH)])
    return {"images": draw(batch, 3, SIDE, SIDE), "layout": layout, "patch_size": PATCH, "sizes": sizes}


ON_CPU = {"reshape + permute": peers.permute_by_sizes, "unfold": peers.unfold_by_sizes}
CARD_PEERS = {
    name: rival(build, functional.patchify)
    for name, build in {
        "reshape + permute": loaded(lambda: peers.permute, peers.with_rows),
        "reshape + permute, compiled": compiled(loaded(lambda: peers.permute, peers.with_rows)),
        "unfold": loaded(lambda: peers.unfold, peers.with_rows),
    }.items()
}


def patchify(shrink: int = 1) -> dict[str, Benchmark]:
    """``shrink`` makes the rows of a card small, for a trial of the code."""
    batch, dtypes = max(2, CARD_BATCH // shrink), (torch.bfloat16, torch.float32)
    return {
        "equal sizes": Benchmark(lambda fill: _equal(fill, BATCH, fill.normal), ("cpu",)),
        "native sizes": Benchmark(lambda fill: _native(fill, BATCH, fill.normal), ("cpu",)),
        f"{CARD_BATCH} x {SIDE}x{SIDE}": Benchmark(
            lambda fill: _equal(fill, batch, fill.drawn), ("cuda",), dtypes, CARD_PEERS
        ),
        f"{CARD_BATCH} x {SIDE // 2}..{SIDE} a side": Benchmark(
            lambda fill: _native(fill, batch, fill.drawn), ("cuda",), dtypes[:1], CARD_PEERS
        ),
    }
