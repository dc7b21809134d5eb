"""``vk.linear``: checks, the choice of implementation, the op and its backward."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks, dispatch, library, native, products
from vlkernels.core.dispatch import Facts, Implementation
from vlkernels.ops.linear import reference



def _kernel_supports(facts: Facts) -> str | None:
    if facts["dtype"] != torch.float32:
        return f"it computes in float32, the data is {facts['dtype']}"
    if facts["autocast"]:
        return "autocast takes products in a half type"
    return facts["better_elsewhere"]


IMPLEMENTATIONS = (
    Implementation(
        "cpp",
        devices=("cpu",),
        available=functools.partial(native.missing, "linear_forward", "CPU"),
        supports=_kernel_supports,
    ),
    Implementation("reference"),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """``y = x weight^T + bias``.

    Example:
        >>> import torch, vlkernels as vk
        >>> x, weight, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
        >>> expected = torch.nn.functional.linear(x, weight, bias)
        >>> torch.testing.assert_close(vk.linear(x, weight, bias), expected)

    Args:
        x: ``[..., K]`` floating; any strides.
        weight: ``[N, K]`` in the dtype of ``x``.
        bias: ``[N]`` in the dtype of ``x``, or ``None``.
        impl: ``"auto"``, ``"cpp"`` or ``"reference"``. ``auto`` takes ``"cpp"`` for large float32 products where
            it was measured to be faster than PyTorch's: on AMD's processors with AVX-512 (MATH.md).

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Gradients: to ``x``, ``weight`` and ``bias``. The kernel's backward has no derivative of its own.
    Numerics: products and sums in float32. The kernel sums every element in the order of the index, so it has
        the same bits for any number of threads, and a row of the result whatever the other rows are.
    Memory: beside the result, one copy of the right factor while a product runs.
    Errors: ``ValueError`` where shapes, dtypes or devices disagree.
    Source: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008.
    """
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    _check(x, weight, bias, autocast)
    facts = {
        "dtype": x.dtype,
        "autocast": autocast,
        "better_elsewhere": _better_elsewhere(x, weight) if impl == "auto" else None,
    }
    if dispatch.resolve("linear", impl, IMPLEMENTATIONS, x.device, facts) == "reference":
        return reference.linear(x, weight, bias)
    rows = x.flatten(end_dim=-2) if x.dim() > 1 else x[None]
    product = _differentiable(rows, weight, None if bias is None else bias.contiguous())
    return product.view(*x.shape[:-1], weight.shape[0])


def _better_elsewhere(x: Tensor, weight: Tensor) -> str | None:
    if not _products_are_slow_here():
        return "PyTorch's own was not measured to be slower on this processor"
    if not torch.compiler.is_compiling():  # whose graphs are for any number of rows
        count, rows = x.numel() * weight.shape[0], math.prod(x.shape[:-1])
        if rows < products.FEWEST_ROWS or count < products.FEWEST_PRODUCTS:
            return (
                f"PyTorch's own is faster below {products.FEWEST_ROWS} rows and below {products.FEWEST_PRODUCTS:,} products"
            )
    return None


@torch.compiler.assume_constant_result
def _products_are_slow_here() -> bool:
    return products.pytorchs_are_slow_here()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    checks.check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        checks.check_shape("weight", weight, "[N, K]", (None, x.shape[-1]))
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        checks.check_shape("bias", bias, "[N]", (weight.shape[0],))
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != x.dtype and not autocast:
            checks.check_dtype(name, parameter, (x.dtype,))
    checks.check_same_device(x=x, weight=weight, bias=bias)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(x.shape if of_x else (0,)), dy.new_empty(weight.shape if of_weight else (0,))


_forward = library.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor", fake=_fake_forward
)
_backward = library.define_backward(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool of_x, bool of_weight) -> (Tensor, Tensor)",
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    dx, dweight = _backward(dy, x, weight, of_x, of_weight)
    return dx if of_x else None, dweight if of_weight else None, dy.sum(0) if of_bias else None


_differentiable = library.differentiable(_forward, setup_context=_setup_context, backward=_differentiate)
