"""Pooling by hand, and SigLIP's learned query against `transformers`, every parameter redrawn."""

import pytest
import torch
import vlkernels as vk

from engine.models.pooling import Pooling
from engine.models.transformer import Tokens
from engine.sections import Stack

transformers = pytest.importorskip("transformers")

STACK = Stack(width=24, heads=3, mlp_width=40, eps=1e-6, activation="gelu_tanh")
LAYOUT = vk.SegmentLayout([[1, 4], [1, 0], [2, 6]])
BOUNDS = [(0, 5), (5, 6), (6, 14)]


def tokens() -> Tokens:
    return Tokens(torch.randn(14, 24, dtype=torch.float64), LAYOUT)


def pooling(kind: str) -> Pooling:
    made = Pooling(kind, STACK, "auto").double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            scale = 0.25 if parameter.dim() >= 2 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return made


def test_one_token():
    read = tokens()
    assert torch.equal(pooling("first")(read), read.hidden[[0, 5, 6]])
    assert torch.equal(pooling("last")(read), read.hidden[[4, 5, 13]])
    pooler = pooling("pooler")
    torch.testing.assert_close(pooler(read), torch.tanh(pooler.dense(read.hidden[[0, 5, 6]])))


@pytest.mark.parametrize("kind", ["first", "last"])
def test_an_empty_sample_is_zero(kind):
    layout = vk.SegmentLayout([[0], [3], [0]])
    hidden = torch.randn(3, 24, dtype=torch.float64)
    assert pooling(kind)(Tokens(hidden, layout))[[0, 2]].abs().max() == 0


def test_mean_of_a_segment():
    read = tokens()
    expected = torch.stack([read.hidden[1:5].mean(0), torch.zeros(24).double(), read.hidden[8:].mean(0)])
    torch.testing.assert_close(pooling("mean")(read, segment=1), expected)


def test_a_learned_query_is_siglips():
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    config = transformers.SiglipVisionConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=40, layer_norm_eps=1e-6
    )
    theirs, ours = SiglipMultiheadAttentionPoolingHead(config).double(), pooling("attention").attention
    maps = ours.query_key_value
    pairs = [
        (theirs.probe, ours.probe[None]),
        (theirs.attention.in_proj_weight, maps.weight),
        (theirs.attention.in_proj_bias, maps.bias),
    ]
    modules = (theirs.attention.out_proj, ours.output), (theirs.layernorm, ours.norm)
    modules = *modules, (theirs.mlp.fc1, ours.inner), (theirs.mlp.fc2, ours.outer)
    pairs += [(getattr(a, kind), getattr(b, kind)) for a, b in modules for kind in ("weight", "bias")]
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    with torch.no_grad():
        for own, source in pairs:
            own.copy_(source)
    read = tokens()
    one, other = read.hidden.clone().requires_grad_(), read.hidden.clone().requires_grad_()
    expected = torch.cat([theirs(other[None, first:last]) for first, last in BOUNDS])
    found = ours(Tokens(one, LAYOUT))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(expected)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(maps.weight.grad, theirs.attention.in_proj_weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.probe.grad[None], theirs.probe.grad, rtol=1e-9, atol=1e-9)
    for a, b in modules:
        torch.testing.assert_close(b.weight.grad, a.weight.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(b.bias.grad, a.bias.grad, rtol=1e-9, atol=1e-9)
