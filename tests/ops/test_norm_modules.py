"""FusedLayerNorm and FusedRMSNorm are nn.LayerNorm and nn.RMSNorm."""

import inspect

import pytest
import torch
from torch import nn

import vlkernels as vk

PAIRS = [(vk.FusedLayerNorm, nn.LayerNorm), (vk.FusedRMSNorm, nn.RMSNorm)]
OPTIONS = {
    nn.LayerNorm: [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-2}],
    nn.RMSNorm: [{}, {"elementwise_affine": False}, {"eps": 1e-2}],
}
CALLS = [(mine, theirs, options) for mine, theirs in PAIRS for options in OPTIONS[theirs]]


def both(mine, theirs, *arguments, **options):
    pair = mine(*arguments, **options), theirs(*arguments, **options)
    for parameter in pair[1].parameters():
        nn.init.normal_(parameter)
    pair[0].load_state_dict(pair[1].state_dict())
    return pair


@pytest.mark.parametrize("shape", [12, (12,), [3, 4], torch.Size((2, 3, 4))])
@pytest.mark.parametrize("mine, theirs, options", CALLS)
def test_values_gradients_state_and_name(mine, theirs, options, shape):
    fused, plain = both(mine, theirs, shape, **options)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert repr(fused) == repr(plain).replace(theirs.__name__, mine.__name__)
    x = torch.randn(5, *plain.normalized_shape, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(norm(x).pow(3).sum(), (x, *norm.parameters())) for norm in (fused, plain)
    )
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(found, wanted)
    y, z = fused(x, residual=x, return_sum=True)
    torch.testing.assert_close((y, z), (plain(x + x), x + x))


@pytest.mark.parametrize("mine, theirs", PAIRS)
def test_constructors_and_calls_have_the_same_signature(mine, theirs):
    assert mine.__init__ is theirs.__init__
    first = [next(iter(list(inspect.signature(kind.forward).parameters)[1:])) for kind in (mine, theirs)]
    assert first[0] == first[1]
    norm = mine(8, device="meta", dtype=torch.bfloat16)
    assert norm.weight.device.type == "meta" and norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("mine, theirs", PAIRS)
def test_reset_parameters(mine, theirs):
    fused, plain = both(mine, theirs, 8)
    fused.reset_parameters(), plain.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("data", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mine, theirs", PAIRS)
def test_on_a_cpu_autocast_changes_nothing(mine, theirs, data):
    fused, plain = both(mine, theirs, 8)
    x = torch.randn(3, 8).to(data)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = fused(x), plain(x)
    assert found.dtype == wanted.dtype == data
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("mine, theirs", PAIRS)
def test_autocast_adds_a_projection_to_a_wider_residual_as_pytorch_does(mine, theirs):
    """The residual stream of a model under autocast stays float32, what a projection gives is of the half type."""
    fused, plain = both(mine, theirs, 8)
    projected, residual = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = fused(projected, residual=residual), plain(projected + residual)
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    gradients = (torch.autograd.grad(y.pow(3).sum(), (projected, residual)) for y in (found, wanted))
    torch.testing.assert_close(*gradients)


def test_the_eps_of_rms_norm_is_that_of_the_dtype_it_computes_in():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        fused, plain = both(*PAIRS[1], 4, dtype=dtype)
        x = torch.randn(3, 4, dtype=dtype) * 1e-4
        torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("mine, theirs", PAIRS)
def test_wrong_shapes_are_named(mine, theirs):
    norm = mine((3, 4))
    for shape in ((5, 4), (4,), (3, 4, 5)):
        with pytest.raises(ValueError, match=rf"x must be \[..., 3, 4\], got \[{', '.join(map(str, shape))}\]"):
            norm(torch.ones(shape))
    with pytest.raises(ValueError, match=r"linear_bias must be \[D\] = \[12\], got \[4\]"):
        norm(torch.ones(2, 3, 4), linear_bias=torch.ones(4))


@pytest.mark.parametrize("mine, theirs", PAIRS)
def test_rows_without_columns_and_no_rows(mine, theirs):
    for shape in ((3, 0), (0, 8), (0, 0)):
        fused, plain = both(mine, theirs, shape[-1])
        x = torch.randn(shape, requires_grad=True)
        found, wanted = (torch.autograd.grad(norm(x).sum(), (x, *norm.parameters())) for norm in (fused, plain))
        torch.testing.assert_close(found, wanted)
