"""What patchify is timed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.peers import compiled, loaded, rival
from vlkernels.core.spec import Arguments, Benchmark, Cost, InputMaker
from vlkernels.ops.patchify import functional, peers

SIDE, PATCH = 224, 16
CPU_IMAGES, CARD_IMAGES = 32, 256

PEERS = {"reshape + permute": peers.patchify_by_permute, "unfold": peers.patchify_by_unfold}
CARD_PEERS = {
    name: rival(build, functional.patchify)
    for name, build in {
        "reshape + permute": loaded(lambda: peers.patchify_by_permute),
        "reshape + permute, compiled": compiled(loaded(lambda: peers.patchify_by_permute)),
        "unfold": loaded(lambda: peers.patchify_by_unfold),
    }.items()
}


def patch_counts(sizes: Sequence[Sequence[int]], patch_size: int) -> list[int]:
    return [(height // patch_size) * (width // patch_size) for height, width in sizes]


def patchify(shrink: int = 1) -> dict[str, Benchmark]:
    """``shrink`` makes the rows of a card small, for a trial of the code."""
    kinds = {"equal sizes": _equal, "native sizes": _native}
    cpu = {name: Benchmark(make(CPU_IMAGES), ("cpu",), (torch.float32, torch.bfloat16)) for name, make in kinds.items()}
    dtypes = {"equal sizes": (torch.bfloat16, torch.float32), "native sizes": (torch.bfloat16,)}
    card = {
        f"{CARD_IMAGES} images, {name}": Benchmark(make(max(2, CARD_IMAGES // shrink)), ("cuda",), dtypes[name], CARD_PEERS)
        for name, make in kinds.items()
    }
    return cpu | card


def _equal(images: int) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        layout = fill.layout([[(SIDE // PATCH) ** 2]] * images)
        return {"images": fill.drawn(images, 3, SIDE, SIDE), "layout": layout, "patch_size": PATCH}

    return make


def _native(images: int) -> Callable[[InputMaker], Arguments]:
    """Sides between half the longest and the longest."""

    def make(fill: InputMaker) -> Arguments:
        sizes = fill.counts(SIDE // 2, SIDE + 1, (images, 2))
        layout = fill.layout([[n] for n in patch_counts(sizes.tolist(), PATCH)])
        return {"images": fill.drawn(images, 3, SIDE, SIDE), "layout": layout, "patch_size": PATCH, "sizes": sizes.to(fill.device)}

    return make


def cost(images: Tensor, layout: SegmentLayout, patch_size: int, sizes: Tensor | None = None) -> Cost:
    """Every pixel of a patch is read and written once; the backward also writes the other pixels' zeros."""
    moved = layout.num_tokens * images.shape[1] * patch_size**2 * images.element_size()
    return Cost(forward_bytes=2 * moved, backward_bytes=moved + images.numel() * images.element_size())
