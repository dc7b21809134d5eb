"""The kernels of impl "triton" that the static report compiles: FILIP's and BLIP-2's widths and slots, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlkernels.core.spec import Variant
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.late_interaction_loss.gpu import launches as made
from vlkernels.ops.late_interaction_loss.gpu.launches import Block

# dtype, D, tokens of an image and of a text
CALLS = (
    (torch.bfloat16, 256, 49, 32),
    (torch.bfloat16, 256, 196, 77),
    (torch.float32, 256, 49, 32),
)
ANY_TWO_CALLS = ((torch.bfloat16, 256, 32, 1),)


def variants(architecture: int) -> Iterator[Variant]:
    for any_two, calls in ((False, CALLS), (True, ANY_TWO_CALLS)):
        for dtype, width, image, text in calls:
            name = str(dtype).removeprefix("torch.")
            facts = {"dtype": name, "width": width, "image": image, "text": text, "any_two": any_two}
            for kernel, launch in launches(dtype, width, image, text, any_two, architecture).items():
                yield Variant(kernel, facts, launch)


def launches(
    dtype: torch.dtype, width: int, image: int, text: int, any_two: bool, architecture: int, pairs: int = 3
) -> dict[str, Launch]:
    """The kernels of a call, without data worth reading."""
    images, texts = (_block(dtype, width, longest, pairs) for longest in (image, text))
    weights = torch.empty(pairs, pairs)
    maxima = made.empty_maxima(images, texts, any_two)
    gradient = torch.empty_like(images.tokens, dtype=torch.float32)
    return {
        **dict(zip(("maxima", "others_maxima"), made.maxima_launches(images, texts, maxima, any_two, architecture))),
        "gradient": made.gradient_launch(
            gradient, images, texts, weights, None if any_two else weights, *maxima[2:], architecture
        ),
    }


def _block(dtype: torch.dtype, width: int, longest: int, pairs: int) -> Block:
    bounds = torch.full((3, pairs), longest, dtype=torch.int32)
    return Block(torch.empty(pairs * longest, width, dtype=dtype), *bounds, longest, pairs * longest, bounds[0], 0)
