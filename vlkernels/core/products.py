"""Products of matrices: large ones in float32 on a CPU by the compiled kernel where it was measured to be faster than PyTorch's
own, and those of a definition in the dtype of their factors, whatever autocast says.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vlkernels.core import library, native

# Below either, PyTorch's own is faster: host time and packing outweigh what the kernel saves (ops/linear/MATH.md).
FEWEST_ROWS, FEWEST_PRODUCTS = 512, 1 << 26

_multiply_into = library.define(
    "multiply_into(Tensor(a!) out, Tensor left, Tensor right, bool add) -> ()", fake=lambda out, left, right, add: None
)


def outside_autocast(like: Tensor) -> torch.autocast:
    """Autocast would take a definition's products in a half type; inside the block it does not."""
    kind = "cuda" if like.is_meta else like.device.type  # meta tensors stand for a device's
    return torch.autocast(kind, enabled=False)


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """``out = left right``, or ``out += left right``; without gradients."""
    rows, depth = left.shape
    large = rows >= FEWEST_ROWS and rows * depth * right.shape[1] >= FEWEST_PRODUCTS
    if large and _kernel_serves(left, right, out):
        _multiply_into(out, left, right, add)
        return out
    return out.addmm_(left, right) if add else torch.mm(left, right, out=out)


def _kernel_serves(left: Tensor, right: Tensor, out: Tensor) -> bool:
    same = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (left, right, out))
    return same and out.is_contiguous() and native.missing("multiply_into") is None and pytorchs_are_slow_here()


@functools.cache
def pytorchs_are_slow_here() -> bool:
    """Whether this is an AMD processor with AVX-512: what the kernel was compared with PyTorch's on."""
    info = native.build_info()
    return info.get("cpu_vendor") == "amd" and info["cpu_isa"] == "avx512"
