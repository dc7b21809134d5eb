"""``vk.layer_norm`` and ``vk.rms_norm``: checks and the choice of implementation."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from vlkernels.core import checks, dispatch, native
from vlkernels.core.dispatch import Facts, Implementation
from vlkernels.core.layout import SegmentLayout
from vlkernels.core.random import Rng, check_stream, dropout_threshold, resolve_rng
from vlkernels.ops.layer_norm import reference
from vlkernels.ops.layer_norm.raw_ops import fuses, normalise

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below this many elements the host time of a training call outweighs what the kernel saves (MATH.md).
FEWEST_ELEMENTS_TO_TRAIN = 300_000
FEWEST_RMS_ELEMENTS_TO_TRAIN = 10_000  # PyTorch has no kernel of its own for RMSNorm on a CPU
WIDEST_CUDA_ROW = 16_384  # csrc/primitives/row_plan.h


def _kernel_supports(facts: Facts) -> str | None:
    if facts["dtype"] not in KERNEL_DTYPES:
        return f"it computes in float32, the data is {facts['dtype']}"
    if facts["too_few"]:
        return f"PyTorch's own is faster below {facts['too_few']:,} elements"
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
    Numerics: statistics (two-pass variance), products and sums over rows in float32 (on the reference as in PyTorch, whose
        sums over rows are of the half type on a CPU).
    Memory: the backward keeps ``z`` (``x`` when nothing is fused) and two floats per row, and no mask.
    Errors: ``ValueError`` where shapes, dtypes or devices disagree, for ``dropout_p`` outside [0, 1), and for
        a ``row_scale`` that requires a gradient.
    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """
    return _normalise(
        "layer_norm", x, weight, bias, eps, residual, linear_bias, dropout_p, row_scale, rng, stream, layout, return_sum, impl
    )  # fmt: skip


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
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
    """``y = z / sqrt(mean(z^2) + eps) * weight`` with ``z = residual + row_scale * dropout(x + linear_bias)``, in one pass.

    The norm of T5 and Llama: rows are not centered, and there is no bias.

    Example:
        >>> import torch, vlkernels as vk
        >>> x, residual, weight = torch.randn(4, 7, 32), torch.randn(4, 7, 32), torch.randn(32)
        >>> y, z = vk.rms_norm(x, weight, residual=residual, return_sum=True)
        >>> torch.testing.assert_close(z, residual + x)
        >>> torch.testing.assert_close(y, z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight)

    Args:
        x: ``[..., D]``, any D; float32, bfloat16 or float16 (float64 on the reference).
        weight: ``[D]`` in the dtype of ``x`` or float32, or ``None`` (one).
        eps: added to the mean of the squares.
        residual, linear_bias, dropout_p, row_scale, rng, stream, layout, return_sum, impl: as for :func:`layer_norm`.

    Returns:
        ``y`` like ``x``, or ``(y, z)``. ``y`` is the RMSNorm of ``z`` as rounded to the dtype of ``x``.

    Gradients: to ``x``, ``residual``, ``linear_bias`` and ``weight``; the same bits in every run and for any number of
        threads, and on every card. The kernel's backward has no derivative of its own.
    Numerics: the mean of the squares, products and sums over rows in float32, rounded to the dtype of ``x`` once, after
        the weight (T5's and Llama's own modules round half types before it as well).
    Memory: the backward keeps ``z`` (``x`` when nothing is fused) and one float per row, and no mask.
    Errors: ``ValueError`` as from :func:`layer_norm`.
    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    return _normalise(
        "rms_norm", x, weight, None, eps, residual, linear_bias, dropout_p, row_scale, rng, stream, layout, return_sum, impl
    )  # fmt: skip


def _normalise(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    linear_bias: Tensor | None,
    dropout_p: float,
    row_scale: Tensor | None,
    rng: Rng | None,
    stream: int,
    layout: SegmentLayout | None,
    return_sum: bool,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    centered = op == "layer_norm"
    _check(x, weight, bias, residual, linear_bias, dropout_p, row_scale, layout)
    check_stream(stream)
    barely_fused = linear_bias is None and dropout_p == 0
    too_few = _too_few_to_train(x, centered) if impl == "auto" and barely_fused else 0
    facts = {"dtype": x.dtype, "width": x.shape[-1], "too_few": too_few}
    if dispatch.resolve(op, impl, IMPLEMENTATIONS, x.device, facts) == "reference":
        fused = {
            "eps": eps, "residual": residual, "linear_bias": linear_bias, "dropout_p": dropout_p, "row_scale": row_scale,
            "rng": rng, "stream": stream, "layout": layout, "return_sum": return_sum,
        }  # fmt: skip
        return reference.layer_norm(x, weight, bias, **fused) if centered else reference.rms_norm(x, weight, **fused)
    threshold = dropout_threshold(dropout_p)
    y, z, *_ = normalise(
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
        centered,
    )
    if not return_sum:
        return y
    return y, z if fuses(residual, linear_bias, row_scale, threshold) else x.clone()


def _too_few_to_train(x: Tensor, centered: bool) -> int:
    """The number of elements that ``x`` falls short of; 0 where it does not, and where PyTorch's LayerNorm adds the gradients
    of its parameters in a half type."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.device.type != "cpu":
        return 0
    if centered and x.dtype in (torch.bfloat16, torch.float16):
        return 0
    fewest = FEWEST_ELEMENTS_TO_TRAIN if centered else FEWEST_RMS_ELEMENTS_TO_TRAIN
    return fewest if x.numel() < fewest else 0


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
    shape, dtype, device = x.shape, x.dtype, x.device
    if not shape:
        raise ValueError("x must be [..., D], got a tensor without dimensions")
    columns = shape[-1:]
    # Every call of every layer comes through here: what is right is only compared.
    for name, parameter in (("weight", weight), ("bias", bias), ("linear_bias", linear_bias)):
        if parameter is not None:
            if parameter.shape != columns:
                checks.check_shape(name, parameter, "[D]", columns)
            if parameter.dtype != dtype:
                checks.check_dtype(name, parameter, (dtype, torch.float32))
            if parameter.device != device:
                checks.check_same_device(x=x, **{name: parameter})
    if residual is not None:
        if residual.shape != shape:
            checks.check_shape("residual", residual, "[..., D]", shape)
        if residual.dtype != dtype:
            checks.check_dtype("residual", residual, (dtype,))
        if residual.device != device:
            checks.check_same_device(x=x, residual=residual)
    if row_scale is not None:
        _check_row_scale(row_scale, x)
    if dropout_p:
        checks.check_probability("dropout_p", dropout_p)
    if layout is not None:
        _check_layout(layout, x)


def _check_layout(layout: SegmentLayout, x: Tensor) -> None:
    if math.prod(x.shape[:-1]) != layout.num_tokens:
        raise ValueError(f"x must have layout.num_tokens = {layout.num_tokens} rows, got {list(x.shape)}")
    if layout.starts.device != x.device:
        raise ValueError(f"layout must be on the device of x, {x.device}, got {layout.starts.device}")


def _check_row_scale(row_scale: Tensor, x: Tensor) -> None:
    checks.check_floating("row_scale", row_scale)
    checks.check_same_device(x=x, row_scale=row_scale)
    rows = math.prod(x.shape[:-1])
    if row_scale.shape != x.shape[:-1] and row_scale.shape != (rows,):
        checks.check_shape("row_scale", row_scale, "[rows]", (rows,))
    if row_scale.requires_grad:
        raise ValueError("row_scale gets no gradient: pass row_scale.detach()")
