"""Find hidden host syncs without a GPU: run code on fake CUDA tensors, where ``.item()``, ``nonzero`` and their kin raise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlkernels.core.spec import Case, InputMaker
from vlkernels.testing.arguments import differentiable_tensors, floating_outputs, map_tensors


@contextlib.contextmanager
def fake_cuda() -> Iterator[Callable[[Any], Any]]:
    """Yields ``move``: it turns real CPU arguments into fake CUDA ones; inside the block a hidden sync raises."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def fake(tensor: Tensor) -> Tensor:
            with mode:
                twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
            return twin.requires_grad_(tensor.requires_grad)

        yield lambda arguments: map_tensors(arguments, fake)


def lint(function: Callable[..., Any], case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Run ``function`` forward and backward on fake CUDA inputs of ``case``; raises where it would wait for the device."""
    real = case.make(InputMaker(dtype))
    with fake_cuda() as move:
        arguments = move(real)
        outputs = [t for t in floating_outputs(function(**arguments)) if t.requires_grad]
        inputs = list(differentiable_tensors(arguments).values())
        if outputs and inputs:
            grads = [torch.empty_like(t) for t in outputs]
            torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
