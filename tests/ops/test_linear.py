"""What is special to linear; the generic contract is in test_contract.py."""

import pytest
import torch

import vlkernels as vk
from vlkernels.core import native
from vlkernels.ops.linear import functional
from vlkernels.testing.error_rule import assert_close

needs_kernel = pytest.mark.skipif(
    native.missing("linear_forward", "CPU") is not None, reason="no compiled library"
)
SIZES = (317, 389, 550)


def inputs(rows, depth, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, depth), (columns, depth), (columns,)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def results(impl, tensors):
    y = vk.linear(*tensors, impl=impl)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, tensors, cotangent)]


@needs_kernel
def test_threads_do_not_change_a_bit():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results("cpp", inputs(*SIZES))[:3])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_kernel
def test_a_row_does_not_depend_on_the_others():
    x, weight, bias = inputs(*SIZES)
    together = vk.linear(x, weight, bias, impl="cpp")
    for some in (slice(0, 1), slice(5, 12), slice(300, None)):
        assert torch.equal(vk.linear(x[some], weight, bias, impl="cpp"), together[some])


@needs_kernel
@pytest.mark.parametrize("isa", native.CPU_ISA_LEVELS)
def test_every_instruction_set(isa):
    tensors = inputs(*SIZES)
    truth, eager = results("reference", inputs(*SIZES, dtype=torch.float64)), results("reference", tensors)
    try:
        native.limit_cpu_isa(isa)
        found = results("cpp", tensors)
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])
    for name, mine, plain, true in zip(("y", "x", "weight", "bias"), found, eager, truth, strict=True):
        assert_close(name, mine, plain, true)


@needs_kernel
def test_infinities_and_nan_stay_where_they_are():
    """Packed panels are filled up to whole registers: what fills them must not reach a result."""
    x, weight, bias = (t.detach() for t in inputs(5, 7, 9))
    x[4], weight[8] = torch.inf, torch.nan
    y = vk.linear(x, weight, bias, impl="cpp")
    assert y[:, 8].isnan().all() and not y[4, :8].isfinite().any()
    torch.testing.assert_close(y[:4, :8], vk.linear(x[:4], weight[:8], bias[:8], impl="reference"))


@needs_kernel
@pytest.mark.parametrize(
    "slow_here, sizes, dtype, chosen",
    [
        (True, (600, 300, 400), torch.float32, "cpp"),
        (False, (600, 300, 400), torch.float32, "reference"),
        (True, (600, 100, 100), torch.float32, "reference"),
        (True, (300, 600, 400), torch.float32, "reference"),
        (True, (600, 300, 400), torch.bfloat16, "reference"),
    ],
)
def test_auto_takes_the_faster_one(monkeypatch, slow_here, sizes, dtype, chosen):
    monkeypatch.setattr(functional, "_products_are_slow_here", lambda: slow_here)
    with vk.recorded() as served:
        vk.linear(*inputs(*sizes, dtype=dtype))
    assert served == [("linear", chosen)]


def test_autocast_takes_the_half_type():
    x, weight, bias = inputs(400, 300, 300)
    with torch.autocast("cpu", torch.bfloat16), vk.recorded() as served:
        assert vk.linear(x, weight, bias).dtype == torch.bfloat16
        vk.linear(x.bfloat16(), weight, bias)
    assert served == [("linear", "reference")] * 2


@needs_kernel
def test_what_wants_no_gradient_gets_none():
    x, weight, bias = inputs(9, 8, 7)
    for wanted in ((x,), (weight,), (bias,), (x, bias)):
        for tensor in (x, weight, bias):
            tensor.requires_grad_(any(tensor is other for other in wanted))
        expected = torch.autograd.grad(vk.linear(x, weight, bias, impl="reference").sum(), wanted)
        found = torch.autograd.grad(vk.linear(x, weight, bias, impl="cpp").sum(), wanted)
        torch.testing.assert_close(found, expected)


@needs_kernel
def test_no_second_derivative():
    x, weight, bias = inputs(9, 8, 7)
    (gradient,) = torch.autograd.grad(vk.linear(x, weight, bias, impl="cpp").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.tensor(1.0)}, r"x must be \[..., K\], got a tensor without dimensions"),
        ({"weight": torch.zeros(7, 9)}, r"weight must be \[N, K\] = \[any, 8\], got \[7, 9\]"),
        ({"bias": torch.zeros(8)}, r"bias must be \[N\] = \[7\], got \[8\]"),
        ({"weight": torch.zeros(7, 8).double()}, "weight must be float32, got float64"),
        ({"x": torch.zeros(9, 8, dtype=torch.int64)}, "x must be one of float64, .*, got int64"),
        ({"bias": torch.zeros(7, device="meta")}, "all tensors must be on one device"),
        ({"impl": "cuda"}, 'impl must be "auto" or one of "cpp", "reference" for linear, got "cuda"'),
    ],
)
def test_mistakes_are_named(changed, message):
    arguments = dict(zip(("x", "weight", "bias"), inputs(9, 8, 7), strict=True)) | changed
    with pytest.raises(ValueError, match=message):
        vk.linear(**arguments)


@needs_kernel
def test_the_kernel_refuses_what_it_cannot_read():
    x, weight, bias = (t.detach() for t in inputs(9, 8, 7))
    for arguments in ((x, weight[:, 1:], None), (x, weight, bias[1:]), (x.double(), weight, None)):
        with pytest.raises(RuntimeError, match="must"):
            torch.ops.vlkernels.linear_forward(*arguments)
    for dy in (x[:, :6], x[:8, :7]):
        with pytest.raises(RuntimeError, match="must"):
            torch.ops.vlkernels.linear_backward(dy, x, weight, True, True)
