"""The ops under ``torch.ops.vlkernels`` of patchify. Images of bytes have ``scale`` and ``shift``; without these pixels are copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlkernels.core import library


def _fake(
    images: Tensor,
    sizes: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    patch_size: int,
    scale: list[float],
    shift: list[float],
    dtype: Any,
    num_rows: int,
) -> Tensor:
    return images.new_empty(num_rows, images.shape[1] * patch_size**2, dtype=dtype)


_patchify = library.define(
    "patchify(Tensor images, Tensor? sizes, Tensor starts, Tensor lengths, int patch_size, "
    "float[] scale, float[] shift, ScalarType dtype, SymInt num_rows) -> Tensor",
    fake=_fake,
)
_patchify_back = library.define_backward(
    "patchify_backward(Tensor grad, Tensor? sizes, Tensor starts, Tensor lengths, int patch_size, "
    "float[] scale, SymInt[] shape) -> Tensor",
    fake=lambda grad, sizes, starts, lengths, patch_size, scale, shape: grad.new_empty(shape),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, sizes, starts, lengths, patch_size, scale, *_ = inputs
    ctx.patch_size, ctx.scale, ctx.shape = patch_size, scale, images.shape
    ctx.save_for_backward(sizes, starts, lengths)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    images = _patchify_back(grad.contiguous(), *ctx.saved_tensors, ctx.patch_size, ctx.scale, list(ctx.shape))
    return images, *[None] * 8


patchify = library.differentiable(_patchify, setup_context=_save, backward=_backward)
