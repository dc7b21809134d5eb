"""The CUDA kernels of patchify in the emulator, called as ``csrc/binding/patchify.cpp`` calls them on a card."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import emulated
from tests.emulated import CSRC, fields
from vlkernels.ops.patchify import functional


def kernels() -> ModuleType:
    return emulated.module(CSRC / "emulator" / "patchify.cpp")


def grid(shape, sizes, starts, lengths, patch_size, rows) -> dict[str, Any]:
    batch, channels, height, width = shape
    return fields(
        batch=batch, channels=channels, height=height, width=width, patch=patch_size, sizes=sizes, starts=starts,
        lengths=lengths, rows=rows,
    )  # fmt: skip


def patchify(images, sizes, starts, lengths, patch_size, scale, shift, dtype, num_rows) -> Tensor:
    patches = images.new_empty(num_rows, images.shape[1] * patch_size**2, dtype=dtype)
    given = fields(
        dtype=dtype, images_are_bytes=images.dtype == torch.uint8, scale=scale, shift=shift, images=images, patches=patches
    )
    kernels().patchify(grid(images.shape, sizes, starts, lengths, patch_size, num_rows) | given)
    return patches


def patchify_backward(grad, sizes, starts, lengths, patch_size, scale, shape) -> Tensor:
    images = grad.new_empty(shape)
    given = fields(dtype=grad.dtype, scale=scale, shift=[], patches=grad, images=images)
    kernels().patchify_backward(grid(shape, sizes, starts, lengths, patch_size, grad.shape[0]) | given)
    return images


def serving(monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    """``impl="cuda"`` of patchify serves CPU tensors inside the block."""
    return emulated.serving(monkeypatch, functional, {"patchify": patchify, "patchify_backward": patchify_backward})
