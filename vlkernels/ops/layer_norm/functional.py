"""``vk.layer_norm``: checks, the choice of implementation, the op and its backward."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks, dispatch, library, native
from vlkernels.core.dispatch import Facts, Implementation
from vlkernels.core.layout import SegmentLayout
from vlkernels.core.random import Rng, check_stream, dropout_threshold, resolve_rng
from vlkernels.ops.layer_norm import reference

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below this many elements the host time of a training call outweighs what the kernel saves (MATH.md).
FEWEST_ELEMENTS_TO_TRAIN = 600_000
WIDEST_CUDA_ROW = 16_384  # csrc/primitives/row_plan.h


def _kernel_supports(facts: Facts) -> str | None:
    if facts["dtype"] not in KERNEL_DTYPES:
        return f"it computes in float32, the data is {facts['dtype']}"
    if facts["too_few"]:
        return f"PyTorch's own is faster below {FEWEST_ELEMENTS_TO_TRAIN:,} elements"
    return None


def _cuda_supports(facts: Facts) -> str | None:
    if facts["width"] > WIDEST_CUDA_ROW:
        return f"it serves D up to {WIDEST_CUDA_ROW:,}, x has D = {facts['width']:,}"
    return _kernel_supports(facts)


IMPLEMENTATIONS = (
    Implementation(
        "cuda",
        devices=("cuda",),
        available=functools.partial(native.missing, "layer_norm_forward", "CUDA"),
        supports=_cuda_supports,
    ),
    Implementation(
        "cpp",
        devices=("cpu",),
        available=functools.partial(native.missing, "layer_norm_forward", "CPU"),
        supports=_kernel_supports,
    ),
    Implementation("reference"),
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    linear_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    row_scale: Tensor | None = None,
    rng: Rng | None = None,
    stream: int = 0,
    layout: SegmentLayout | None = None,
    return_sum: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``y = LN(z)`` with ``z = residual + row_scale * dropout(x + linear_bias)``, in one pass over memory.

    Example:
        >>> import torch, vlkernels as vk
        >>> x, residual = torch.randn(4, 7, 32), torch.randn(4, 7, 32)
        >>> weight, bias = torch.randn(32), torch.randn(32)
        >>> y, z = vk.layer_norm(x, weight, bias, residual=residual, return_sum=True)
        >>> torch.testing.assert_close(z, residual + x)
        >>> torch.testing.assert_close(y, torch.nn.functional.layer_norm(residual + x, (32,), weight, bias))

    Args:
        x: ``[..., D]``, any D; float32, bfloat16 or float16 (float64 on the reference).
        weight, bias: ``[D]`` in the dtype of ``x`` or float32, or ``None`` (one and zero).
        eps: added to the variance.
        residual: like ``x``.
        linear_bias: ``[D]``, the bias of the projection that made ``x``, in the dtype of ``x`` or float32.
        dropout_p: probability that an element of ``x + linear_bias`` is dropped, rounded to 1/256; kept ones
            are scaled so that the expectation stays. No mask is stored: the backward draws it again.
        row_scale: ``[...]`` or ``[rows]``, a constant factor per row (stochastic depth). It gets no gradient.
        rng: state of the dropout; ``None`` draws one from PyTorch's generator. It must not advance before the
            backward.
        stream: constant of this call site: different streams drop different elements.
        layout: the rows of ``x`` are its tokens; dropout is then keyed by sample id and position in the
            sample. Without it by sample 0 and the index of the row.
        return_sum: also return ``z``; its gradient adds to that of the norm.
        impl: ``"auto"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.

    Returns:
        ``y`` like ``x``, or ``(y, z)``. ``y`` is the LayerNorm of ``z`` as rounded to the dtype of ``x``.

    Gradients: to ``x``, ``residual``, ``linear_bias``, ``weight`` and ``bias``; the same bits in every run
        and for any number of threads, and on every card. The kernel's backward has no derivative of its own.
    Numerics: statistics (two-pass variance), products and sums over rows in float32.
    Memory: the backward keeps ``z`` (``x`` when nothing is fused) and two floats per row, and no mask.
    Errors: ``ValueError`` where shapes, dtypes or devices disagree, for ``dropout_p`` outside [0, 1), and for
        a ``row_scale`` that requires a gradient.
    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """
    _check(x, weight, bias, residual, linear_bias, dropout_p, row_scale, layout)
    check_stream(stream)
    barely_fused = linear_bias is None and dropout_p == 0
    too_few = impl == "auto" and barely_fused and _too_few_to_train(x)
    facts = {"dtype": x.dtype, "width": x.shape[-1], "too_few": too_few}
    if dispatch.resolve("layer_norm", impl, IMPLEMENTATIONS, x.device, facts) == "reference":
        return reference.layer_norm(
            x,
            weight,
            bias,
            eps=eps,
            residual=residual,
            linear_bias=linear_bias,
            dropout_p=dropout_p,
            row_scale=row_scale,
            rng=rng,
            stream=stream,
            layout=layout,
            return_sum=return_sum,
        )
    threshold = dropout_threshold(dropout_p)
    y, z, _, _ = _differentiable(
        x.contiguous(),
        None if residual is None else residual.contiguous(),
        None if linear_bias is None else linear_bias.contiguous(),
        None if row_scale is None else row_scale.reshape(-1).float().contiguous(),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        resolve_rng(rng, x.device) if threshold else None,
        layout.token_keys() if threshold and layout is not None else None,
        stream,
        threshold,
        eps,
        return_sum or torch.is_grad_enabled(),
    )
    if not return_sum:
        return y
    return y, z if _fused(residual, linear_bias, row_scale, threshold) else x.clone()


def _too_few_to_train(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return x.device.type == "cpu" and x.numel() < FEWEST_ELEMENTS_TO_TRAIN


def _fused(
    residual: Tensor | None, linear_bias: Tensor | None, row_scale: Tensor | None, threshold: int
) -> bool:
    return residual is not None or linear_bias is not None or row_scale is not None or threshold > 0


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    linear_bias: Tensor | None,
    dropout_p: float,
    row_scale: Tensor | None,
    layout: SegmentLayout | None,
) -> None:
    checks.check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must be [..., D], got a tensor without dimensions")
    shape, dtype, device = x.shape, x.dtype, x.device
    for name, parameter in (("weight", weight), ("bias", bias), ("linear_bias", linear_bias)):
        if parameter is not None:
            if parameter.dim() != 1 or parameter.shape[0] != shape[-1]:
                checks.check_shape(name, parameter, "[D]", (shape[-1],))
            if parameter.dtype != dtype:
                checks.check_dtype(name, parameter, (dtype, torch.float32))
            if parameter.device != device:
                checks.check_same_device(x=x, **{name: parameter})
    if residual is not None:
        if residual.shape != shape:
            checks.check_shape("residual", residual, "[..., D]", shape)
        checks.check_dtype("residual", residual, (dtype,))
        checks.check_same_device(x=x, residual=residual)
    if row_scale is not None:
        _check_row_scale(row_scale, x)
    if dropout_p:
        checks.check_probability("dropout_p", dropout_p)
    if layout is not None and math.prod(shape[:-1]) != layout.num_tokens:
        raise ValueError(f"x must have layout.num_tokens = {layout.num_tokens} rows, got {list(shape)}")


def _check_row_scale(row_scale: Tensor, x: Tensor) -> None:
    checks.check_floating("row_scale", row_scale)
    checks.check_same_device(x=x, row_scale=row_scale)
    rows = math.prod(x.shape[:-1])
    if row_scale.shape != x.shape[:-1] and row_scale.shape != (rows,):
        checks.check_shape("row_scale", row_scale, "[rows]", (rows,))
    if row_scale.requires_grad:
        raise ValueError("row_scale gets no gradient: pass row_scale.detach()")


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    linear_bias: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    keys: Tensor | None,
    stream: int,
    threshold: int,
    eps: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = keep_sum and _fused(residual, linear_bias, row_scale, threshold)
    statistics = x.new_empty((math.prod(x.shape[:-1]),), dtype=torch.float32)
    return (
        torch.empty_like(x),
        torch.empty_like(x) if kept else x.new_empty((0,)),
        statistics,
        torch.empty_like(statistics),
    )


def _backward_fake(
    dy: Tensor,
    dsum: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    linear_bias: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    keys: Tensor | None,
    stream: int,
    threshold: int,
) -> tuple[Tensor, ...]:
    dx_differs = row_scale is not None or threshold > 0
    sums = (
        z.new_empty((0,), dtype=torch.float32) if p is None else torch.empty_like(p)
        for p in (weight, bias, linear_bias)
    )
    return torch.empty_like(z), torch.empty_like(z) if dx_differs else z.new_empty((0,)), *sums


_forward = library.define(
    "layer_norm_forward(Tensor x, Tensor? residual, Tensor? linear_bias, Tensor? row_scale, Tensor? weight, "
    "Tensor? bias, Tensor? rng_state, Tensor? keys, SymInt stream, int threshold, float eps, bool keep_sum) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
_backward = library.define_backward(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor z, Tensor mean, Tensor rstd, Tensor? linear_bias, "
    "Tensor? row_scale, Tensor? weight, Tensor? bias, Tensor? rng_state, Tensor? keys, SymInt stream, "
    "int threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, linear_bias, row_scale, weight, bias, rng_state, keys, stream, threshold, _, _ = inputs
    _, z, mean, rstd = output
    saved = z if _fused(residual, linear_bias, row_scale, threshold) else x
    ctx.save_for_backward(saved, mean, rstd, linear_bias, row_scale, weight, bias, rng_state, keys)
    ctx.stream, ctx.threshold = stream, threshold
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    z, mean, rstd, linear_bias, row_scale, weight, bias, rng_state, keys = ctx.saved_tensors
    dy = torch.zeros_like(z) if dy is None else dy.contiguous()
    dsum = (
        dsum.contiguous() if dsum is not None and dsum.shape == z.shape else None
    )  # without a sum: an empty tensor's
    dz, dx, dweight, dbias, dlinear_bias = _backward(
        dy,
        dsum,
        z,
        mean,
        rstd,
        linear_bias,
        row_scale,
        weight,
        bias,
        rng_state,
        keys,
        ctx.stream,
        ctx.threshold,
    )
    wants = ctx.needs_input_grad
    return (
        (dx if row_scale is not None or ctx.threshold else dz) if wants[0] else None,
        dz if wants[1] else None,
        dlinear_bias if wants[2] else None,
        None,
        dweight if wants[4] else None,
        dbias if wants[5] else None,
        *[None] * 6,
    )


_differentiable = library.differentiable(_forward, setup_context=_setup_context, backward=_differentiate)
