"""A shared block: one set of parameters, draws of their own for every application."""

import itertools

import pytest
import torch
import vlkernels as vk
from stack_parity import LENGTHS, layout_of, redraw

from engine.models.transformer import PackedTransformer, Tokens
from engine.sections import Stack


def shared(layers, dropout):
    stack = Stack(
        width=32, layers=layers, heads=4, mlp_width=48, norm="post", shared=True, dropout=dropout, attention_dropout=dropout,
        activation_dropout=dropout,
    )  # fmt: skip
    streams = itertools.count(5)
    return redraw(PackedTransformer(stack, streams)), streams


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_layers_are_two_passes_but_for_their_draws(dropout):
    (one, streams), (two, more) = shared(1, dropout), shared(2, dropout)
    two.load_state_dict(one.state_dict())
    tokens, rng = Tokens(torch.randn(sum(LENGTHS), 32, dtype=torch.float64), layout_of()), vk.Rng(3)
    twice = one(one(tokens, rng=rng), rng=rng).hidden
    once = two(tokens, rng=rng).hidden
    assert torch.equal(once, two(tokens, rng=rng).hidden)
    assert torch.allclose(once, twice) == (dropout == 0)
    sites = next(streams) - 5
    assert next(more) - 5 == 2 * sites == 2 * (3 + (dropout > 0)), "a constant for attention, its output and the feed-forward"


def test_recomputed_layers_draw_again_what_they_drew():
    gradients = []
    for recompute in (False, True):
        model, _ = shared(3, 0.3)
        model.activation_checkpointing = recompute
        hidden = torch.linspace(-1, 1, sum(LENGTHS) * 32, dtype=torch.float64).view(-1, 32).requires_grad_()
        model(Tokens(hidden, layout_of()), rng=vk.Rng(3)).hidden.square().sum().backward()
        gradients.append([hidden.grad, *(parameter.grad for parameter in model.parameters())])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)
