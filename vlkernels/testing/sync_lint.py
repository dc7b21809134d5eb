"""Find hidden host syncs without a GPU: run code where ``.item()``, ``nonzero`` and their kin raise.

Two passes: forward on fake CUDA tensors (the code sees ``is_cuda``), then forward and backward on meta tensors, because autograd
on fake CUDA tensors needs a torch that was built with CUDA. Dispatch takes meta tensors for a device's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from vlkernels.core.spec import Case, InputMaker
from vlkernels.testing.arguments import differentiable_tensors, floating_outputs, map_tensors


def lint(function: Callable[..., Any], case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Run ``function`` on the shapes of ``case``; raises where it would wait for the device."""
    real = case.make(InputMaker(dtype))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=False), _Indexing():
        function(**map_tensors(real, lambda t: _twin(t, "cuda")))
    arguments = map_tensors(real, lambda t: _twin(t, "meta"))
    outputs = [t for t in floating_outputs(function(**arguments)) if t.requires_grad]
    inputs = list(differentiable_tensors(arguments).values())
    if outputs and inputs:
        torch.autograd.grad(outputs, inputs, [torch.empty_like(t) for t in outputs], allow_unused=True)


class _Indexing(TorchFunctionMode):
    """Indexes CUDA tensors by the shapes of their meta twins: a torch without CUDA cannot even slice a fake one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and args[0].is_cuda:
            meta = map_tensors(args, lambda t: _twin(t, "meta"))
            return _twin(meta[0][meta[1]], "cuda")
        return func(*args, **(kwargs or {}))


def _twin(tensor: Tensor, device: str) -> Tensor:
    """A tensor of the same form, without data."""
    form = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return form.requires_grad_(tensor.requires_grad and torch.is_grad_enabled())
