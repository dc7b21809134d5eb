"""What is special to rms_norm; the generic contract is in test_contract.py, what it shares with layer_norm in test_layer_norm.py."""

import pytest
import torch
import torch.nn.functional as F

import vlkernels as vk
from vlkernels.core import native
from vlkernels.core.random import dropout_scale, keep_mask
from vlkernels.ops.layer_norm.functional import FEWEST_RMS_ELEMENTS_TO_TRAIN
from vlkernels.testing.error_rule import assert_close

needs_kernel = pytest.mark.skipif(native.missing("layer_norm_forward", "CPU") is not None, reason="no compiled library")
IMPLS = ["reference", pytest.param("cpp", marks=needs_kernel)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def results(norm, tensors):
    """The output and the gradients along a cotangent that is the same for every norm."""
    y = norm(*tensors)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, *torch.autograd.grad(y, tensors, cotangent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 3, 16, 63, 100, 769])
def test_it_is_pytorchs(width, impl, dtype):
    tensors = leaves((6, width), (width,), dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    found = results(lambda x, weight: vk.rms_norm(x, weight, eps=0.01, impl=impl), tensors)
    eager, truth = (results(lambda x, weight: F.rms_norm(x, (width,), weight, 0.01), t) for t in (tensors, wide))
    for mine, plain, true in zip(found, eager, truth, strict=True):
        assert_close(f"{width}, {impl}", mine, plain, true)


def test_rows_are_not_centered():
    x = torch.full((2, 8), 3.0)
    torch.testing.assert_close(vk.rms_norm(x, None), torch.ones(2, 8))
    torch.testing.assert_close(vk.layer_norm(x, None, None), torch.zeros(2, 8))


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_is_the_core_mask(impl):
    rows, width, p, stream, rng = 5, 200, 0.3, 9, vk.Rng(77)
    _, z = vk.rms_norm(torch.ones(rows, width), None, dropout_p=p, rng=rng, stream=stream, return_sum=True, impl=impl)
    expected = keep_mask(rng.state, stream, 0, torch.arange(rows)[:, None], torch.arange(width), p)
    assert torch.equal(z, expected * dropout_scale(p))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(dtype):
    tensors = leaves((70, 83), (83,), (70, 83), dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]

    def norm(impl):
        options = {"dropout_p": 0.1, "rng": vk.Rng(5), "impl": impl}
        return lambda x, weight, residual: vk.rms_norm(x, weight, residual=residual, **options)

    eager, truth = results(norm("reference"), tensors), results(norm("reference"), wide)
    try:
        for isa in ("baseline", "avx2", "avx512"):
            torch.ops.vlkernels.limit_cpu_isa(isa)
            for mine, plain, true in zip(results(norm("cpp"), tensors), eager, truth, strict=True):
                assert_close(isa, mine, plain, true)
    finally:
        torch.ops.vlkernels.limit_cpu_isa("avx512")


@needs_kernel
def test_threads_do_not_change_a_bit():
    tensors, found, before = leaves((3000, 40), (40,)), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(lambda x, weight: vk.rms_norm(x, weight, impl="cpp"), tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_kernel
def test_compiles_without_a_graph_break():
    def block(x, residual, weight, rng):
        y, z = vk.rms_norm(x, weight, residual=residual, dropout_p=0.1, rng=rng, return_sum=True)
        return y * 2 + z

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 8):
        inputs = leaves((rows, 40), (rows, 40), (40,))
        eager, traced = (results(lambda *t, f=f: f(*t, vk.Rng(2)), inputs) for f in (block, compiled))
        torch.testing.assert_close(traced, eager)


@needs_kernel
def test_a_second_derivative_is_refused():
    (x,) = leaves((3, 8))
    (gradient,) = torch.autograd.grad(vk.rms_norm(x, None, impl="cpp").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@needs_kernel
def test_auto_takes_what_is_faster():
    enough, few = torch.ones(FEWEST_RMS_ELEMENTS_TO_TRAIN // 8, 8), torch.ones(2, 8)
    with vk.recorded() as served:
        for x, options in ((enough, {}), (few, {}), (few, {"dropout_p": 0.1})):
            vk.rms_norm(x, None, **options)
        with torch.no_grad():
            vk.rms_norm(few, None)
    assert [impl for _, impl in served] == ["cpp", "reference", "cpp", "cpp"]


@needs_kernel
def test_no_mean_is_stored():
    x = torch.randn(7, 16)
    rest = [None] * 7
    mean, rstd = torch.ops.vlkernels.layer_norm_forward(x, *rest, 0, 0, 1e-6, True, False)[2:]
    assert mean.numel() == 0 and rstd.shape == (7,)
    with pytest.raises(RuntimeError, match="a norm that is not centered has no bias"):
        torch.ops.vlkernels.layer_norm_forward(x, *rest[:4], torch.ones(16), None, None, 0, 0, 1e-6, True, False)
