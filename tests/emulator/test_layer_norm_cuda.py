"""The CUDA kernels of layer_norm and rms_norm, run thread by thread on the CPU from the sources and by the plan of the launcher."""

import functools

import pytest
import torch

import vlkernels as vk
from tests import emulated
from tests.emulated import layer_norm as emulated_layer_norm
from tests.norm_cases import WIDTHS, of
from tests.norm_cases import fused_norm as whole
from vlkernels.core import dispatch
from vlkernels.core.random import dropout_scale, keep_mask
from vlkernels.core.spec import Case
from vlkernels.ops.layer_norm.functional import WIDEST_CUDA_ROW
from vlkernels.ops.layer_norm.spec import CASES, SPECS, without_bias
from vlkernels.testing import contract

pytestmark = pytest.mark.skipif(emulated.refusal() is not None, reason=str(emulated.refusal()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    with emulated_layer_norm.serving(monkeypatch):
        module = emulated_layer_norm.kernels()
        yield module
        module.run_in_order()


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def spec(request):
    return request.param


def verify(spec, case, dtype):
    contract.verify(spec, of(spec, case), dtype, "cuda")


def layer_norm(x, weight=None, **options):
    return vk.layer_norm(x, weight, None, impl="cuda", **options)


def rms_norm(x, weight=None, **options):
    return vk.rms_norm(x, weight, impl="cuda", **options)


both = pytest.mark.parametrize("norm", [layer_norm, rms_norm])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(spec, case, dtype):
    verify(spec, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 2056, 4100, 8192, 16383])
def test_every_width(spec, width, dtype):
    verify(spec, whole(3 if width > 1024 else 13, width), dtype)


@pytest.mark.parametrize("rows", [0, 1, 2, 31, 1087])
def test_any_number_of_rows(spec, rows):
    verify(spec, whole(rows, 24, None), torch.bfloat16)


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("width", [264, 1512, 4101, 4104])
def test_the_order_of_threads_does_not_change_a_bit(emulator, spec, width, seed):
    case = of(spec, whole(5, width))
    in_order = contract.run(spec.functional, case, torch.float32, impl="cuda")
    emulator.shuffle(seed)
    shuffled = contract.run(spec.functional, case, torch.float32, impl="cuda")
    for name, tensor in in_order.named().items():
        assert torch.equal(tensor, shuffled.named()[name]), name


@pytest.mark.parametrize("shift", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_that_begins_off_a_boundary(spec, dtype, shift):
    """Such rows are served column by column."""

    def moved(tensor):
        whole = torch.empty(tensor.numel() + shift, dtype=tensor.dtype)
        whole[shift:] = tensor.detach().flatten()
        return whole[shift:].view(tensor.shape).requires_grad_(tensor.requires_grad)

    def make(fill):
        arguments = whole(4, 768).make(fill)
        return arguments | {"x": moved(arguments["x"]), "bias": moved(arguments["bias"])}

    verify(spec, Case("moved", make), dtype)


def test_rows_that_lie_apart():
    wide = torch.randn(6, 100)
    x, residual = wide[:, 10:58], wide[:, 52:]
    expected = vk.layer_norm(x, None, None, residual=residual, impl="reference")
    torch.testing.assert_close(vk.layer_norm(x, None, None, residual=residual, impl="cuda"), expected)
    torch.testing.assert_close(
        vk.layer_norm(x.t(), None, None, impl="cuda"), vk.layer_norm(x.t(), None, None, impl="reference")
    )


@both
@pytest.mark.parametrize("width", [64, 77, 4101, 16384])
def test_dropout_is_the_core_mask(norm, width):
    rows, p, stream = 3, 0.3, 9
    rng = vk.Rng(77)
    rng.advance(3)
    x = torch.ones(rows, width, requires_grad=True)
    _, z = norm(x, dropout_p=p, rng=rng, stream=stream, return_sum=True)
    kept = keep_mask(rng.state, stream, 0, torch.arange(rows)[:, None], torch.arange(width), p)
    assert torch.equal(z, kept * dropout_scale(p))
    (gradient,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(gradient, kept * dropout_scale(p))


@both
@pytest.mark.parametrize("width", [40, 4101])
def test_backward_twice(norm, width):
    x, weight = torch.randn(9, width, requires_grad=True), torch.randn(width, requires_grad=True)
    loss = norm(x, weight, dropout_p=0.2, rng=vk.Rng(3)).square().sum()
    first, second = (torch.autograd.grad(loss, (x, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_the_emulator_is_what_serves(monkeypatch):
    x = torch.randn(4, 24)
    with dispatch.recorded() as served:
        vk.layer_norm(x, None, None)
    assert served == [("layer_norm", "cuda")]
    assert emulated_layer_norm.kernels().widest_row == WIDEST_CUDA_ROW
    monkeypatch.setattr(emulated_layer_norm, "kernels", lambda: pytest.fail("called"))
    with pytest.raises(pytest.fail.Exception, match="called"):
        vk.layer_norm(x, None, None)


@both
def test_rows_further_apart_than_31_bits_count(norm):
    rows = torch.randn(2, 48).bfloat16()
    x = emulated.sparse(2, 2**31 + 16, torch.bfloat16)[:, -48:].copy_(rows)
    assert x.stride(0) > 2**31
    assert torch.equal(norm(x, residual=x), norm(rows, residual=rows))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("width", [1024, 16383, 16384])
def test_more_elements_than_31_bits_count(emulator, width, centered):
    rows = 2**31 // width + 5
    x, y, dy, dz = (emulated.sparse(rows, width, torch.bfloat16) for _ in range(4))
    x[-1], dy[-1] = torch.randn(2, width).unbind()
    mean, rstd = torch.zeros(rows) if centered else None, torch.zeros(rows)
    call = emulated.fields(dtype=x.dtype, width=width, rows=rows, eps=1e-5, x=x, y=y, z=x, mean=mean, rstd=rstd, dy=dy, dz=dz)
    norm = torch.nn.functional.layer_norm if centered else functools.partial(torch.nn.functional.rms_norm, eps=1e-5)
    per_block = 4 if width == 1024 else 1
    emulator.only_blocks((rows - 1) // per_block, rows)
    emulator.forward({name: value for name, value in call.items() if name != "z"})
    wide = x[-1].float().requires_grad_()
    expected = norm(wide, (width,))
    torch.testing.assert_close(y[-1], expected.detach().bfloat16())

    blocks = emulator.partial_rows(call)
    emulator.only_blocks((rows - 1) // per_block % blocks, (rows - 1) // per_block % blocks + 1)
    partials = torch.empty(blocks, 3, width)
    emulator.backward(call | emulated.fields(partials=partials))
    expected.backward(dy[-1].float())
    torch.testing.assert_close(dz[-1], wide.grad.bfloat16(), rtol=2e-2, atol=2e-2)


def test_more_rows_than_the_grid_takes_at_once(emulator):
    """Four rows to a block and 2**20 blocks: the first block takes the rows that are left."""
    rows = 2**22 + 3
    x, y = emulated.sparse(rows, 8, torch.float32), emulated.sparse(rows, 8, torch.float32)
    x[-3:] = torch.randn(3, 8)
    mean, rstd = torch.zeros(rows), torch.zeros(rows)
    emulator.only_blocks(0, 1)
    emulator.forward(emulated.fields(dtype=x.dtype, width=8, rows=rows, eps=1e-5, x=x, y=y, mean=mean, rstd=rstd))
    torch.testing.assert_close(y[-3:], torch.nn.functional.layer_norm(x[-3:], (8,)))
    assert rstd.count_nonzero() == 7
