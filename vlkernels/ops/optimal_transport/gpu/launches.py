"""impl "triton" on the host: outputs and the launches of both directions. Triton is imported by the first call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core import triton_runtime
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.optimal_transport.gpu.tile_sizes import MOST_IMAGES, gradient_tile, is_resident, plan_tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Sides(NamedTuple):
    """The tokens of both sides and where the samples lie, as the raw ops are given them."""

    image_tokens: Tensor
    text_tokens: Tensor
    image_starts: Tensor
    image_lengths: Tensor
    text_starts: Tensor
    text_lengths: Tensor
    image_segment: int
    text_segment: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        assert all(t.is_contiguous() for t in self[:6]), "the kernels read these tensors without strides"
        return self[:6]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The kernels' (width, samples, segments of both sides, which of them)."""
        samples, image_segments = self.image_starts.shape
        segments = image_segments, self.text_starts.shape[1], self.image_segment, self.text_segment
        return self.image_tokens.shape[1], samples, *segments

    @property
    def architecture(self) -> int:
        return triton_runtime.architecture(self.image_starts.device)


def refusal(facts: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot serve a call; ``None`` when they can."""
    if facts["dtype"] not in DTYPES:
        return f"it computes in float32, the tokens are {str(facts['dtype']).removeprefix('torch.')}"
    if facts["longest_image"] > MOST_IMAGES:
        return f"it serves samples of up to {MOST_IMAGES} image tokens, the longest may have {facts['longest_image']}"
    return None


def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(distances, plans ``[B, longest text, longest image]``, factors ``[2, B, longest text + longest image]``); the last two
    are for the backward, and empty where there will be none."""
    *sides, longest_image, longest_text, beta, iterations, gradient = inputs
    call = Sides(*sides)
    samples = call.image_starts.shape[0]
    distances = call.image_tokens.new_empty(samples, dtype=torch.float32)
    kept = gradient or not is_resident(longest_text, longest_image)
    plans = distances.new_empty((samples, longest_text, longest_image) if kept else 0)
    factors = distances.new_empty((2, samples, longest_text + longest_image) if kept else 0)
    if samples == 0 or longest_image == 0 or longest_text == 0:
        distances.zero_()
    else:
        made = (plans, factors) if kept else (None, None)
        with torch.cuda.device_of(distances):
            plan_launch(call, distances, *made, (longest_image, longest_text), beta, iterations, call.architecture).run()
    return (distances, plans, factors) if gradient else (distances, plans.new_empty(0), factors.new_empty(0))


def backward(grad_distances: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    *sides, plans, factors = inputs
    call = Sides(*sides)
    grads = torch.empty_like(call.image_tokens), torch.empty_like(call.text_tokens)
    if plans.numel() == 0:
        return grads[0].zero_(), grads[1].zero_()
    with torch.cuda.device_of(plans):
        gradient_launch(call, grad_distances, plans, factors, *grads, call.architecture).run()
    return grads


def plan_launch(
    call: Sides, distances: Tensor, plans: Tensor | None, factors: Tensor | None, longest: tuple[int, int], beta: float,
    iterations: int, architecture: int,
) -> Launch:  # fmt: skip
    """``longest``: of images, of texts. ``plans`` and ``factors`` are ``None`` where a resident plan need not be written."""
    longest_image, longest_text = longest
    tile = plan_tile(longest_text, longest_image, call.image_tokens.dtype, architecture)
    streams = not is_resident(longest_text, longest_image)
    cosines = (torch.empty_like(plans),) if streams else ()
    arguments = (*call.tensors, distances, plans, *cosines, factors, *call.numbers, *longest, beta, iterations)
    constants = {"TEXTS": tile.texts, "IMAGES": tile.images, "DEPTH": tile.depth}
    kernel = _kernels().streaming_kernel if streams else _kernels().resident_kernel
    return Launch(kernel, (call.image_starts.shape[0],), arguments, constants, tile.warps, tile.stages)


def gradient_launch(
    call: Sides, grad_distances: Tensor, plans: Tensor, factors: Tensor, grad_images: Tensor, grad_texts: Tensor,
    architecture: int,
) -> Launch:  # fmt: skip
    samples, longest_text, longest_image = plans.shape
    tile = gradient_tile(max(longest_text, longest_image), architecture)
    rows = call.image_tokens.shape[0], call.text_tokens.shape[0]
    arguments = (
        grad_distances, *call.tensors, plans, factors, grad_images, grad_texts, *call.numbers, longest_image, longest_text,
        *rows,
    )  # fmt: skip
    constants = {"ROWS": tile.rows, "OTHERS": tile.others, "DEPTH": tile.depth}
    tiles = -(-longest_text // tile.rows) + -(-longest_image // tile.rows)
    return Launch(_kernels().gradient_kernel, (samples * tiles,), arguments, constants, tile.warps, tile.stages)


def _kernels() -> Any:
    from vlkernels.ops.optimal_transport.gpu import kernels

    return kernels
