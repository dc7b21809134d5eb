"""What is special to layer_norm and FusedLayerNorm; the generic contract is in test_contract.py."""

import pytest
import torch
import torch.nn.functional as F

import vlkernels as vk
from vlkernels.core import dispatch, native
from vlkernels.core.random import dropout_scale, keep_mask
from vlkernels.ops.layer_norm.functional import FEWEST_ELEMENTS_TO_TRAIN
from vlkernels.testing.error_rule import assert_close

needs_kernel = pytest.mark.skipif(
    native.missing("layer_norm_forward", "CPU") is not None, reason="no compiled library"
)
IMPLS = ["reference", pytest.param("cpp", marks=needs_kernel)]


def grads(loss_output, *inputs, retain=True):
    cotangent = torch.randn(loss_output.shape, generator=torch.Generator().manual_seed(1)).to(
        loss_output.dtype
    )
    return torch.autograd.grad(loss_output, inputs, cotangent, retain_graph=retain)


def leaves(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_mask_is_the_core_mask(impl):
    rows, width, p, stream = 5, 200, 0.3, 9
    rng = vk.Rng(77)
    rng.advance(3)
    x = torch.ones(rows, width)
    _, z = vk.layer_norm(x, None, None, dropout_p=p, rng=rng, stream=stream, return_sum=True, impl=impl)
    expected = keep_mask(rng.state, stream, 0, torch.arange(rows)[:, None], torch.arange(width), p)
    torch.testing.assert_close(z, expected * dropout_scale(p), rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_follows_the_sample_and_not_its_place(impl):
    x = torch.ones(12, 64)
    one = vk.SegmentLayout([[5], [7]], sample_ids=[40, 50])
    other = vk.SegmentLayout([[7], [5]], sample_ids=[50, 40])
    first, second = (
        vk.layer_norm(x, None, None, dropout_p=0.5, rng=vk.Rng(1), layout=layout, return_sum=True, impl=impl)[
            1
        ]
        for layout in (one, other)
    )
    torch.testing.assert_close(first[:5], second[7:], rtol=0, atol=0)
    torch.testing.assert_close(first[5:], second[:7], rtol=0, atol=0)


@needs_kernel
@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 63, 64, 100, 769])
def test_any_width(width):
    x, residual, weight, bias = leaves((6, width), (6, width), (width,), (width,))
    options = {"residual": residual, "dropout_p": 0.2, "rng": vk.Rng(3)}
    outputs = [vk.layer_norm(x, weight, bias, impl=impl, **options) for impl in ("cpp", "reference")]
    wide = [t.double().detach().requires_grad_() for t in (x, residual, weight, bias)]
    truth = vk.layer_norm(
        wide[0], *wide[2:], residual=wide[1], dropout_p=0.2, rng=vk.Rng(3), impl="reference"
    )
    assert_close("y", outputs[0], outputs[1], truth)
    all_grads = [grads(output, x, residual, weight, bias) for output in outputs] + [
        grads(truth.float(), *wide)
    ]
    for mine, eager, true in zip(*all_grads):
        assert_close("gradient", mine, eager, true)


@needs_kernel
def test_threads_do_not_change_a_bit():
    x, residual, weight, bias = leaves((3000, 40), (3000, 40), (40,), (40,))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = vk.layer_norm(x, weight, bias, residual=residual, impl="cpp")
            results.append((y, *grads(y, x, weight, bias)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set(dtype):
    x, residual, weight = leaves((70, 83), (70, 83), (83,), dtype=dtype)
    options = {"residual": residual, "dropout_p": 0.1, "rng": vk.Rng(5)}
    wide = [t.double().detach().requires_grad_() for t in (x, residual, weight)]
    truth = vk.layer_norm(wide[0], wide[2], None, **options | {"residual": wide[1]}, impl="reference")
    eager = vk.layer_norm(x, weight, None, **options, impl="reference")
    try:
        for isa in ("baseline", "avx2", "avx512"):
            torch.ops.vlkernels.limit_cpu_isa(isa)
            y = vk.layer_norm(x, weight, None, **options, impl="cpp")
            assert_close(isa, y, eager, truth)
            for mine, plain, true in zip(
                grads(y, x, weight), grads(eager, x, weight), grads(truth.to(dtype), wide[0], wide[2])
            ):
                assert_close(f"gradient, {isa}", mine, plain, true)
    finally:
        torch.ops.vlkernels.limit_cpu_isa("avx512")


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rounding_is_pytorchs(dtype):
    """The stored sum is PyTorch's addition bit for bit: ties, subnormals, overflow, infinities and NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64)
    for shift in (1, 1023, 30000):
        other = bits.flatten().roll(shift).view(-1, 64).contiguous()
        _, z = vk.layer_norm(bits, None, None, residual=other, return_sum=True, impl="cpp")
        torch.testing.assert_close(z, other + bits, rtol=0, atol=0, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("isa", native.CPU_ISA_LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_larger_than_the_caches(dtype, isa):
    """They are written past the caches, by other instructions: the bits are those of a call on half the rows, on one thread."""
    rows, width = (2**24 + 2**20) // 64 // dtype.itemsize, 64
    x, residual, weight, bias = leaves((rows, width), (rows, width), (width,), (width,), dtype=dtype)
    row_scale = torch.arange(rows) % 3 / 2

    def results(part, threads):
        torch.set_num_threads(threads)
        options = {"residual": residual[part], "row_scale": row_scale[part], "return_sum": True, "impl": "cpp"}
        y, z = vk.layer_norm(x[part], weight, bias, **options)
        return y, z, *torch.autograd.grad(y, (x, residual), residual[part])

    before = torch.get_num_threads()
    try:
        torch.ops.vlkernels.limit_cpu_isa(isa)
        whole, half = results(slice(None), 3), results(slice(rows // 2), 1)
    finally:
        torch.ops.vlkernels.limit_cpu_isa("avx512")
        torch.set_num_threads(before)
    for large, small in zip(whole, half, strict=True):
        assert torch.equal(large[: rows // 2], small[: rows // 2])


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_have_gradients_too(impl):
    x, residual, weight, bias = leaves((0, 8), (0, 8), (8,), (8,))
    y = vk.layer_norm(x, weight, bias, residual=residual, impl=impl)
    found = grads(y, x, residual, weight, bias)
    assert [tuple(gradient.shape) for gradient in found] == [(0, 8), (0, 8), (8,), (8,)]
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_the_returned_sum_alone(impl):
    x, residual = leaves((4, 24), (4, 24))
    _, z = vk.layer_norm(x, None, None, residual=residual, return_sum=True, impl=impl)
    torch.testing.assert_close(grads(z, x, residual), 2 * grads(x + 0, x))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_and_inputs_that_are_views(impl):
    whole, weight, bias = leaves((6, 64), (32,), (32,))
    x, residual = whole[:, :32], whole[:, 32:]
    expected = F.layer_norm(x + residual, (32,), weight, bias)
    torch.testing.assert_close(vk.layer_norm(x, weight, bias, residual=residual, impl=impl), expected)
    with torch.no_grad():
        torch.testing.assert_close(vk.layer_norm(x, weight, bias, residual=residual, impl=impl), expected)


@needs_kernel
def test_second_derivative_is_refused():
    (x,) = leaves((3, 8))
    (gradient,) = torch.autograd.grad(vk.layer_norm(x, None, None, impl="cpp").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)


@needs_kernel
def test_advancing_before_the_backward_is_an_error():
    (x,), rng = leaves((3, 8)), vk.Rng(0)
    y = vk.layer_norm(x, None, None, dropout_p=0.5, rng=rng, impl="cpp")
    rng.advance()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.ones(7)}, r"weight must be \[D\] = \[8\], got \[7\]"),
        ({"residual": torch.ones(2, 8)}, r"residual must be \[..., D\] = \[3, 8\], got \[2, 8\]"),
        ({"residual": torch.ones(3, 8, dtype=torch.float64)}, "residual must be float32, got float64"),
        ({"row_scale": torch.ones(2)}, r"row_scale must be \[rows\] = \[3\], got \[2\]"),
        ({"row_scale": torch.ones(3, requires_grad=True)}, "row_scale gets no gradient"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"layout": vk.SegmentLayout([[4]])}, r"x must have layout.num_tokens = 4 rows, got \[3, 8\]"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must be one of .*, got int64"),
    ],
)
def test_errors_name_the_argument_and_the_values(change, message):
    arguments = {"x": torch.ones(3, 8), "weight": None, "bias": None} | change
    with pytest.raises(ValueError, match=message):
        vk.layer_norm(**arguments)


@needs_kernel
def test_auto_takes_what_is_faster():
    enough, few = torch.ones(FEWEST_ELEMENTS_TO_TRAIN // 8, 8), torch.ones(2, 8)
    with dispatch.recorded() as served:
        vk.layer_norm(enough, None, None)
        vk.layer_norm(few, None, None, dropout_p=0.1)
        with torch.no_grad():
            vk.layer_norm(few, None, None)
        vk.layer_norm(few, None, None)
        vk.layer_norm(few.double(), None, None, dropout_p=0.1)
    assert [impl for _, impl in served] == ["cpp", "cpp", "cpp", "reference", "reference"]
    with pytest.raises(ValueError, match="computes in float32"):
        vk.layer_norm(few.double(), None, None, impl="cpp")


@needs_kernel
@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_batches_of_half_types_add_gradients_of_parameters_in_float32(dtype):
    """PyTorch's kernel adds them in the half type on a CPU, and is several per cent off."""
    torch.manual_seed(0)
    x, gradient = torch.randn(1500, 32, dtype=dtype), torch.randn(1500, 32, dtype=dtype)
    parameters = [torch.randn(32, dtype=dtype, requires_grad=True) for _ in range(2)]
    exact = [p.detach().double().requires_grad_() for p in parameters]
    vk.layer_norm(x, *parameters).backward(gradient)
    torch.nn.functional.layer_norm(x.double(), (32,), *exact).backward(gradient.double())
    for ours, true in zip(parameters, exact, strict=True):
        assert (ours.grad.double() - true.grad).abs().max() < 4 * torch.finfo(dtype).eps * true.grad.abs().max()


def test_compiles_without_a_graph_break():
    def block(x, residual, weight, bias, rng):
        y, z = vk.layer_norm(x, weight, bias, residual=residual, dropout_p=0.1, rng=rng, return_sum=True)
        return y * 2 + z

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 8):
        inputs = leaves((rows, 40), (rows, 40), (40,), (40,))
        eager, traced = (f(*inputs, vk.Rng(2)) for f in (block, compiled))
        torch.testing.assert_close(traced, eager)
        torch.testing.assert_close(grads(traced, *inputs, retain=False), grads(eager, *inputs))


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_module_replaces_pytorchs(shape, options):
    theirs, mine = (kind(shape, eps=1e-3, **options) for kind in (torch.nn.LayerNorm, vk.FusedLayerNorm))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    mine.load_state_dict(theirs.state_dict())
    (x,) = leaves((5, *shape))
    torch.testing.assert_close(mine(x), theirs(x))
    torch.testing.assert_close(
        grads(mine(x), x, *mine.parameters()), grads(theirs(x), x, *theirs.parameters())
    )
    y, z = mine(x, residual=x, return_sum=True)
    torch.testing.assert_close((y, z), (theirs(x + x), x + x))
    assert repr(mine) == repr(theirs).replace("LayerNorm", "FusedLayerNorm")


def test_module_under_autocast():
    theirs, mine = torch.nn.LayerNorm(8), vk.FusedLayerNorm(8)
    for x in (torch.randn(3, 8), torch.randn(3, 8).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            assert mine(x).dtype == theirs(x).dtype


def test_module_names_a_wrong_shape():
    with pytest.raises(ValueError, match=r"x must be \[..., 3, 4\], got \[5, 4\]"):
        vk.FusedLayerNorm((3, 4))(torch.ones(5, 4))
