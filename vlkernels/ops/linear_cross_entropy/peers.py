"""Other people's linear cross-entropy. Those that must be imported are functions that import them and return the call."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]


def dense(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """The loss in float32, as models compute it from logits of any dtype."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)


def torch_chunked() -> Loss:
    """PyTorch's own, in the chunks that it chooses (torch >= 2.13)."""
    function, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return lambda hidden, weight, targets, bias=None: function(hidden, weight, targets, linear_bias=bias, options=options)


def liger() -> Loss:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda hidden, weight, targets, bias=None: function(hidden, weight, targets, bias=bias)


def cut() -> Loss:
    """Apple's cut cross-entropy, which leaves out small gradients; its sums in float32, as ours."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    sums = {"accum_e_fp32": True, "accum_c_fp32": True}
    return lambda hidden, weight, targets, bias=None: function(hidden, weight, targets, bias=bias, **sums)


def quack() -> Loss:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            raise NotImplementedError("its chunks take no bias")
        return function(hidden, weight, targets)

    return call
