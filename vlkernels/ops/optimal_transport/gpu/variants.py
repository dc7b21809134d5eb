"""The kernels of impl "triton" that the static report compiles: the sides of the systems that use this distance, 768 wide."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.spec import Variant
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.optimal_transport.gpu.launches import Sides, gradient_launch, plan_launch
from vlkernels.ops.optimal_transport.gpu.tile_sizes import is_resident

WIDTH = 768
# (dtype, texts, images): UNITER's captions and regions, the square of the benchmarks, ViLT's captions and patches.
CALLS = ((torch.bfloat16, 20, 100), (torch.bfloat16, 40, 40), (torch.bfloat16, 40, 240), (torch.float32, 40, 40))
GRADIENT_CALLS = ((torch.bfloat16, 40, 40), (torch.float32, 40, 40))


def variants(architecture: int) -> Iterator[Variant]:
    for dtype, texts, images in CALLS:
        name = "resident_plan" if is_resident(texts, images) else "streamed_plan"
        yield Variant(name, _facts(dtype, texts, images), launches(dtype, texts, images, architecture)["plan"])
    for dtype, texts, images in GRADIENT_CALLS:
        launch = launches(dtype, texts, images, architecture)["gradient"]
        yield Variant("gradient", _facts(dtype, texts, images), launch)


def launches(dtype: torch.dtype, texts: int, images: int, architecture: int, samples: int = 2) -> dict[str, Launch]:
    """The kernels of a call on samples of one length, without data worth reading."""
    layouts = [SegmentLayout([[length]] * samples) for length in (images, texts)]
    tokens = [torch.empty(layout.num_tokens, WIDTH, dtype=dtype) for layout in layouts]
    places = [tensor for layout in layouts for tensor in (layout.starts, layout.lengths)]
    call = Sides(*tokens, *places, image_segment=0, text_segment=0)
    distances = torch.empty(samples)
    plans, factors = torch.empty(samples, texts, images), torch.empty(2, samples, texts + images)
    grads = [torch.empty_like(side) for side in tokens]
    return {
        "plan": plan_launch(call, distances, plans, factors, (images, texts), 0.5, 50, architecture),
        "gradient": gradient_launch(call, distances, plans, factors, *grads, architecture),
    }


def _facts(dtype: torch.dtype, texts: int, images: int) -> dict[str, str | int]:
    return {"dtype": str(dtype).removeprefix("torch."), "texts": texts, "images": images}
