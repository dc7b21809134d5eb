"""What layer_norm and rms_norm are given wrongly or oddly: served rightly, or refused in one line that has the values."""

import mmap

import pytest
import torch

import vlkernels as vk
from vlkernels.core import native

needs_kernel = pytest.mark.skipif(native.missing("layer_norm_forward", "CPU") is not None, reason="no compiled library")
IMPLS = ["reference", pytest.param("cpp", marks=needs_kernel)]


def layer_norm(x, **options):
    return vk.layer_norm(x, options.pop("weight", None), None, **options)


def rms_norm(x, **options):
    return vk.rms_norm(x, options.pop("weight", None), **options)


both = pytest.mark.parametrize("norm", [layer_norm, rms_norm])


def one_line(error):
    return "\n" not in str(error.value)


@both
@pytest.mark.parametrize("name", ["weight", "linear_bias"])
def test_a_wrong_width(norm, name):
    with pytest.raises(ValueError, match=rf"{name} must be \[D\] = \[8\], got \[7\]") as error:
        norm(torch.ones(3, 8), **{name: torch.ones(7)})
    assert one_line(error)
    with pytest.raises(ValueError, match=rf"{name} must be \[D\] = \[8\], got \[1, 8\]"):
        norm(torch.ones(3, 8), **{name: torch.ones(1, 8)})


@both
@pytest.mark.parametrize("name", ["weight", "linear_bias", "residual"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_beside_float32_data(norm, name, half):
    value = torch.ones(3, 8) if name == "residual" else torch.ones(8)
    with pytest.raises(ValueError, match=rf"{name} must be float32, got {str(half)[6:]}") as error:
        norm(torch.ones(3, 8), **{name: value.to(half)})
    assert one_line(error)


@both
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_float32_parameters_beside_half_precision_data(norm, impl, half):
    x, weight, linear_bias = torch.randn(3, 8).to(half), torch.randn(8), torch.randn(8)
    found = norm(x, weight=weight, linear_bias=linear_bias, impl=impl)
    wide = norm((x.float() + linear_bias).to(half).float(), weight=weight, impl="reference")
    assert found.dtype == half
    torch.testing.assert_close(found.float(), wide, rtol=2 * torch.finfo(half).eps, atol=1e-3)


@both
@pytest.mark.parametrize(
    "name, value",
    [
        ("weight", torch.ones(8, device="meta")),
        ("linear_bias", torch.ones(8, device="meta")),
        ("residual", torch.ones(3, 8, device="meta")),
        ("row_scale", torch.ones(3, device="meta")),
    ],
)
def test_tensors_on_several_devices(norm, name, value):
    with pytest.raises(ValueError, match=f"all tensors must be on one device, got x on cpu, {name} on meta") as error:
        norm(torch.ones(3, 8), **{name: value})
    assert one_line(error)


@both
def test_a_layout_and_a_generator_on_another_device(norm):
    x, layout, rng = torch.ones(3, 8), vk.SegmentLayout([[3]]), vk.Rng(0)
    with pytest.raises(ValueError, match="layout must be on the device of x, cpu, got meta"):
        norm(x, layout=layout.to("meta"), dropout_p=0.1, rng=rng)
    rng.state = rng.state.to("meta")
    with pytest.raises(ValueError, match="rng must be on the device of its inputs, cpu, got meta"):
        norm(x, layout=layout, dropout_p=0.1, rng=rng)


@both
@pytest.mark.parametrize(
    "x, message",
    [
        (torch.tensor(1.0), r"x must be \[..., D\], got a tensor without dimensions"),
        (torch.ones(3, 8, dtype=torch.int32), "x must be one of .*, got int32"),
        (torch.ones(3, 8, dtype=torch.complex64), "x must be one of .*, got complex64"),
        ([[1.0]], "x must be a Tensor, got a list"),
    ],
)
def test_what_is_no_row_of_floats(norm, x, message):
    with pytest.raises(ValueError, match=message) as error:
        norm(x)
    assert one_line(error)


@pytest.mark.parametrize("kind", [vk.FusedLayerNorm, vk.FusedRMSNorm])
def test_half_precision_modules_refuse_float32_data(kind):
    with pytest.raises(ValueError, match="weight must be float32, got bfloat16"):
        kind(8).to(torch.bfloat16)(torch.ones(3, 8))


@both
@pytest.mark.parametrize("impl", IMPLS)
def test_not_finite_values_stay_in_their_row(norm, impl):
    x = torch.randn(4, 40)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = norm(x, impl=impl)
    assert y[[0, 3]].isfinite().all() and y[1].isnan().all() and y[2, 5].isnan()


@both
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_further_apart_than_31_bits_count(norm, impl):
    """A view of memory that takes none before it is written."""
    apart, flags = 2**31 + 16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    whole = torch.frombuffer(mmap.mmap(-1, 2 * (apart + 64), flags=flags), dtype=torch.bfloat16)
    rows = torch.randn(2, 48).bfloat16()
    x = whole.as_strided((2, 48), (apart, 1)).copy_(rows)
    assert torch.equal(norm(x, impl=impl), norm(rows, impl=impl))
    assert torch.equal(norm(rows, residual=x, impl=impl), norm(rows, residual=rows, impl=impl))


@both
@pytest.mark.parametrize("impl", IMPLS)
def test_columns_that_lie_apart(norm, impl):
    x = torch.randn(48, 6).t()
    assert not x.is_contiguous()
    torch.testing.assert_close(norm(x, impl=impl), norm(x.contiguous(), impl=impl))


@both
@needs_kernel
def test_a_gradient_whose_rows_are_one(norm):
    """The gradient of a sum is expanded: all its elements are one."""
    x = torch.randn(5, 40, requires_grad=True)
    for wanted in (lambda y: y.sum(), lambda y: (y * torch.ones(())).mean()):
        found, expected = (torch.autograd.grad(wanted(norm(x, impl=impl)), x) for impl in ("cpp", "reference"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
