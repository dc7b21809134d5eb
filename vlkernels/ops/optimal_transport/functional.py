"""The transport distance as users call it: checks, the choice of implementation, the op and its backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks, dispatch, library, native
from vlkernels.core.dispatch import Facts, Implementation
from vlkernels.core.layout import SegmentLayout
from vlkernels.core.triton_runtime import TritonImplementation
from vlkernels.ops.optimal_transport import reference
from vlkernels.ops.optimal_transport.gpu import launches

# Below, the scales of the plan leave the range of float32 on tokens that are equal or opposite (MATH.md).
SMALLEST_BETA = 0.1


def _computes_in_float32(facts: Facts) -> str | None:
    if facts["dtype"] == torch.float64:
        return "it computes in float32, the tokens are float64"
    return None


IMPLEMENTATIONS = (
    TritonImplementation(supports=launches.refusal),
    Implementation(
        "cpp",
        devices=("cpu",),
        available=functools.partial(native.missing, "optimal_transport_forward", "CPU"),
        supports=_computes_in_float32,
    ),
    Implementation("reference"),
)


def optimal_transport(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_layout: SegmentLayout,
    text_layout: SegmentLayout,
    image_segment: int = 0,
    text_segment: int = 0,
    beta: float = 0.5,
    iterations: int = 50,
    impl: str = "auto",
) -> Tensor:
    """``out[b] = sum_ij T_ij (1 - cos(text_i, image_j))``: the cost of carrying texts to their images.

    ``T`` is the transport plan between uniform weights that IPOT, the inexact proximal point method, has
    after ``iterations`` steps of one update each (UNITER's and ViLT's word-region alignment).

    Tokens are packed rows, and a layout's segment says which of them belong to a sample: both sides may be
    one joint stream, read in place.

    Example:
        >>> import torch, vlkernels as vk
        >>> hidden = torch.eye(4)[[0, 1, 1, 0, 2, 3, 3]]             # two samples, text then regions
        >>> layout = vk.SegmentLayout([[2, 2], [1, 2]])
        >>> where = {"text_layout": layout, "image_layout": layout, "image_segment": 1}
        >>> vk.optimal_transport(hidden, hidden, **where).round(decimals=4)
        tensor([0., 1.])

    Args:
        image_tokens: ``[num_tokens of image_layout, D]``, floating. Need not be normalised.
        text_tokens: ``[num_tokens of text_layout, D]``, same dtype and device; may be the same tensor.
        image_layout: on the device of the tokens; may have gaps (``SegmentLayout.padded``), other segments.
        text_layout: as many samples as ``image_layout``; sample b of one meets sample b of the other.
        image_segment: the segment of ``image_layout`` that holds the image tokens.
        text_segment: the segment of ``text_layout`` that holds the text tokens.
        beta: the weight of a step's proximity, at least 0.1; a larger one takes smaller steps.
        iterations: proximal steps, at least 1.
        impl: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Returns:
        ``[B]`` in float32 (float64 for float64): between 0 and 2; 0 where a side has no token.

    Gradients: to both tokens through the cosine alone, the plan is a constant; zero in all rows of other
        segments and of nobody. Given one tensor for both sides, autograd adds the two.
    Numerics: costs, plan and sums in float32 (float64 for float64), also under autocast; norms are at least
        1e-5. Between steps a pair keeps 1e-35 of the plan, which can show beyond ``100 * beta`` iterations
        (MATH.md). NaN or infinite tokens make their own sample NaN and no other.
    Memory: for the backward the plans, ``[B, longest text, longest image]``, and the tokens. ``"triton"`` also takes room for
        plans and cosines where a sample may have more than 8,192 pairs, its sides rounded up to powers of two.
    Errors: ``ValueError`` for shapes, dtypes, devices and values out of range.
    Source: Xie et al. 2019 (IPOT); Chen et al. 2020 (UNITER).
    """
    _check(image_tokens, image_layout, image_segment, text_tokens, text_layout, text_segment)
    _check_steps(beta, iterations)
    longest_image = image_layout.max_segment_lengths[image_segment]
    longest_text = text_layout.max_segment_lengths[text_segment]
    facts = {"dtype": image_tokens.dtype, "longest_image": longest_image}
    chosen = dispatch.resolve("optimal_transport", impl, IMPLEMENTATIONS, image_tokens.device, facts)
    if chosen == "reference":
        return reference.optimal_transport(
            image_tokens,
            text_tokens,
            image_layout=image_layout,
            text_layout=text_layout,
            image_segment=image_segment,
            text_segment=text_segment,
            beta=beta,
            iterations=iterations,
        )
    arguments = (
        image_tokens.contiguous(),
        text_tokens.contiguous(),
        image_layout.starts,
        image_layout.lengths,
        text_layout.starts,
        text_layout.lengths,
        image_segment,
        text_segment,
        longest_image,
        longest_text,
        float(beta),
        iterations,
        torch.is_grad_enabled() and (image_tokens.requires_grad or text_tokens.requires_grad),
    )
    return (_triton(*arguments, chosen) if chosen == "triton" else _compiled(*arguments))[0]


def _check(
    image_tokens: Tensor,
    image_layout: SegmentLayout,
    image_segment: int,
    text_tokens: Tensor,
    text_layout: SegmentLayout,
    text_segment: int,
) -> None:
    checks.check_floating("image_tokens", image_tokens)
    checks.check_dtype("text_tokens", text_tokens, (image_tokens.dtype,))
    checks.check_shape("image_tokens", image_tokens, "[num_tokens, D]", (image_layout.num_tokens, None))
    width = image_tokens.shape[1]
    checks.check_shape("text_tokens", text_tokens, "[num_tokens, D]", (text_layout.num_tokens, width))
    checks.check_same_device(
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        image_layout=image_layout.starts,
        text_layout=text_layout.starts,
    )
    if text_layout.num_samples != image_layout.num_samples:
        raise ValueError(
            f"text_layout must have the samples of image_layout = {image_layout.num_samples}, "
            f"got {text_layout.num_samples}"
        )
    for name, layout, segment in (
        ("image_segment", image_layout, image_segment),
        ("text_segment", text_layout, text_segment),
    ):
        if not 0 <= segment < layout.num_segments:
            raise ValueError(f"{name} must be an index below {layout.num_segments}, got {segment}")


def _check_steps(beta: float, iterations: int) -> None:
    if not SMALLEST_BETA <= beta < float("inf"):
        raise ValueError(f"beta must be finite and at least {SMALLEST_BETA}, got {beta}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


def _fake(image_tokens: Tensor, text_tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    image_lengths, longest_image, longest_text, gradient = rest[1], rest[6], rest[7], rest[10]
    samples = image_lengths.shape[0]
    shape = (samples, longest_text, longest_image) if gradient else (0,)
    distances = image_tokens.new_empty(samples, dtype=torch.float32)
    return distances, image_tokens.new_empty(shape, dtype=torch.float32)


def _fake_with_factors(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    distances, plans = _fake(*inputs)
    longest_image, longest_text, gradient = inputs[8], inputs[9], inputs[12]
    shape = (2, distances.shape[0], longest_text + longest_image) if gradient else (0,)
    return distances, plans, distances.new_empty(shape)


def _fake_backward(grad: Tensor, image_tokens: Tensor, text_tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return image_tokens.new_empty(image_tokens.shape), text_tokens.new_empty(text_tokens.shape)


_SIDES = (
    "Tensor image_tokens, Tensor text_tokens, Tensor image_starts, Tensor image_lengths, Tensor text_starts, "
    "Tensor text_lengths, int image_segment, int text_segment"
)
_FORWARD = f"{_SIDES}, SymInt longest_image, SymInt longest_text, float beta, SymInt iterations, bool gradient"

_forward = library.define(f"optimal_transport_forward({_FORWARD}) -> (Tensor distances, Tensor plans)", fake=_fake)
_backward = library.define_backward(
    f"optimal_transport_backward(Tensor grad_distances, {_SIDES}, Tensor plans) -> (Tensor, Tensor)", fake=_fake_backward
)
_triton_forward = library.define(
    f"optimal_transport_triton_forward({_FORWARD}, str impl) -> (Tensor distances, Tensor plans, Tensor factors)",
    fake=_fake_with_factors,
    kernels={"triton": launches.forward},
)
_triton_backward = library.define_backward(
    f"optimal_transport_triton_backward(Tensor grad_distances, {_SIDES}, Tensor plans, Tensor factors, str impl) "
    "-> (Tensor, Tensor)",
    fake=_fake_backward,
    kernels={"triton": launches.backward},
)


def _keep_plans(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.segments = inputs[6:8]
    ctx.impl = inputs[13:]  # for the op that has one


def _differentiate(ctx: Any, grad_distances: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (11 + len(ctx.impl))
    if grad_distances is None:
        return None, None, *nothing
    sides, kept = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    backward = _triton_backward if ctx.impl else _backward
    gradients = backward(grad_distances.contiguous(), *sides, *ctx.segments, *kept, *ctx.impl)
    wanted = zip(gradients, ctx.needs_input_grad[:2], strict=True)
    return *(gradient if needed else None for gradient, needed in wanted), *nothing


_compiled = library.differentiable(_forward, setup_context=_keep_plans, backward=_differentiate)
_triton = library.differentiable(_triton_forward, setup_context=_keep_plans, backward=_differentiate)
