"""The CPU kernels of the norms on the shapes that the CUDA kernels are tried on: widths, numbers of rows, threads, calls."""

import pytest
import torch

import vlkernels as vk
from tests.norm_cases import ROWS, WIDTHS, fused_norm, normed_embedding, of
from vlkernels.core import native
from vlkernels.core.random import keep_mask
from vlkernels.core.spec import InputMaker
from vlkernels.ops.embed_layer_norm.spec import SPECS as EMBEDDING
from vlkernels.ops.layer_norm.spec import SPECS as NORMS
from vlkernels.testing import contract
from vlkernels.testing.arguments import differentiable_tensors

pytestmark = pytest.mark.skipif(native.missing("layer_norm_forward", "CPU") is not None, reason="no compiled library")
CASES = [(NORMS[0], fused_norm), (NORMS[1], fused_norm), (EMBEDDING[0], normed_embedding)]
each = pytest.mark.parametrize(("spec", "case"), CASES, ids=lambda value: getattr(value, "name", ""))


def made(spec, case):
    return of(spec, case) if spec in NORMS else case


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(spec, case, width, dtype):
    contract.verify(spec, made(spec, case(3 if width > 1024 else 13, width)), dtype, "cpp")


@each
@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows(spec, case, rows):
    contract.verify(spec, made(spec, case(rows, 24, None)), torch.bfloat16, "cpp")


@each
@pytest.mark.parametrize("width", [24, 4096])
def test_backward_twice(spec, case, width):
    arguments = made(spec, case(9, width)).make(InputMaker(torch.float32))
    y = spec.functional(**arguments, impl="cpp")
    inputs = differentiable_tensors(arguments).values()
    loss = sum(t.square().sum() for t in (y if isinstance(y, tuple) else (y,)))
    first, second = (torch.autograd.grad(loss, [*inputs], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("width", [1, 7, 770, 16384])
def test_dropout_is_the_core_mask_at_any_width(width, impl):
    rows, p, rng = 3, 0.3, vk.Rng(77)
    kept = keep_mask(rng.state, 9, 0, torch.arange(rows)[:, None], torch.arange(width), p)
    x, options = torch.ones(rows, width), {"dropout_p": p, "rng": rng, "stream": 9, "impl": impl}
    for norm in (vk.rms_norm, lambda x, weight, **others: vk.layer_norm(x, weight, None, **others)):
        assert torch.equal(norm(x, None, return_sum=True, **options)[1] != 0, kept)
    bias = torch.ones(width)
    assert torch.equal(vk.embed_layer_norm(None, [], torch.zeros(width), bias=bias, dense=x, **options) != 0, kept)
