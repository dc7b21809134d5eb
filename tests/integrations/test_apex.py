"""The norms of apex: constructors, state dicts, dtypes and autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import vlkernels as vk
from vlkernels.integrations import apex
from vlkernels.integrations.apex import FusedLayerNorm, FusedRMSNorm, MixedFusedLayerNorm, MixedFusedRMSNorm

KINDS = [FusedLayerNorm, FusedRMSNorm, MixedFusedLayerNorm, MixedFusedRMSNorm]


def filled(norm):
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("kind", KINDS)
def test_constructor_and_state(kind):
    norm = kind((3, 4), eps=1e-3, memory_efficient=True)
    names = ["weight", "bias"] if "LayerNorm" in kind.__name__ else ["weight"]
    assert list(norm.state_dict()) == names and norm.weight.shape == (3, 4)
    assert (norm.normalized_shape, norm.eps, norm.memory_efficient) == ((3, 4), 1e-3, True)
    assert repr(norm).startswith(f"{kind.__name__}((3, 4), eps=0.001, elementwise_affine=True")
    assert norm.weight.eq(1).all() and kind(8).eps == 1e-5


@pytest.mark.parametrize("kind", KINDS[:2])
def test_without_parameters(kind):
    norm, x = kind(8, 1e-5, False), torch.randn(5, 8)
    assert not norm.state_dict()
    expected = F.layer_norm(x, (8,)) if kind is FusedLayerNorm else F.rms_norm(x, (8,), eps=1e-5)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_mixed_norms_have_parameters(kind):
    with pytest.raises(RuntimeError, match=f"{kind.__name__} does not support elementwise_affine=False"):
        kind(8, elementwise_affine=False)
    with pytest.warns(UserWarning, match="elementwise_affine says nothing"):
        kind(8, elementwise_affine=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'affine'"):
        kind(8, affine=True)


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, shape):
    norm, x = filled(kind(shape)), torch.randn(5, *shape, requires_grad=True)
    parameters = list(norm.parameters())
    expected = F.layer_norm(x, shape, *parameters) if len(parameters) == 2 else F.rms_norm(x, shape, *parameters, eps=1e-5)
    torch.testing.assert_close(norm(x), expected)
    found, wanted = (torch.autograd.grad(y.pow(3).sum(), (x, *parameters)) for y in (norm(x), expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "data, weight, plain, mixed",
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, None, torch.bfloat16),
        (torch.float16, torch.bfloat16, None, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kinds", [KINDS[::2], KINDS[1::2]])
def test_the_dtype_of_the_output(kinds, data, weight, plain, mixed):
    x = torch.randn(5, 8).to(data)
    norms = [filled(kind(8)).to(weight) for kind in kinds]
    if plain is None:
        with pytest.raises(ValueError, match="weight must be (one of )?float"):
            norms[0](x)
    else:
        assert norms[0](x).dtype == plain
    found = norms[1](x)
    truth = norms[1].double()(x.double())
    assert found.dtype == mixed
    torch.testing.assert_close(found.double(), truth, rtol=2 * torch.finfo(mixed).eps, atol=1e-6)


@pytest.fixture
def cuda_autocast():
    """On fake tensors: autocast looks at no card."""
    torch.set_autocast_enabled("cuda", True)
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_dtype("cuda", before)
    torch.set_autocast_enabled("cuda", False)


def dtype_under_autocast(kind, data, weight):
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        norm = kind(8)
        for name, _ in list(norm.named_parameters()):
            setattr(norm, name, nn.Parameter(torch.empty(8, dtype=weight)))
        return norm(torch.empty(3, 8, dtype=data)).dtype


HALF_OR_MORE = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("weight", HALF_OR_MORE[:3])
@pytest.mark.parametrize("data", HALF_OR_MORE[:3])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_they_run_in_its_dtype(cuda_autocast, kind, data, weight):
    assert dtype_under_autocast(kind, data, weight) == torch.bfloat16


@pytest.mark.parametrize("weight", HALF_OR_MORE[:3])
@pytest.mark.parametrize("data", HALF_OR_MORE)
@pytest.mark.parametrize("kinds", [(vk.FusedLayerNorm, nn.LayerNorm), (vk.FusedRMSNorm, nn.RMSNorm)])
def test_pytorchs_norms_run_in_float32(cuda_autocast, kinds, data, weight):
    if data == torch.float64 and weight != torch.float32:
        pytest.skip("not cast, and no dtype that its parameters may have")
    mine, theirs = (dtype_under_autocast(kind, data, weight) for kind in kinds)
    assert mine == theirs == (torch.float64 if data == torch.float64 else torch.float32)


def test_the_module_is_public():
    assert vk.integrations.apex is apex
