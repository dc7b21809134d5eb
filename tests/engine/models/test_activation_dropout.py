"""Dropout inside the feed-forward network: behind the non-linearity, by sample and position, in training alone."""

import itertools

import pytest
import torch
import vlkernels as vk
from torch.nn import functional as F

from engine.models.transformer import PackedTransformer, Tokens
from engine.models.transformer.feed_forward import FeedForward
from engine.models.transformer.tokens import Context
from engine.sections import Stack
from vlkernels.core.random import dropout_scale, keep_columns

LENGTHS, WIDTH, INNER, SHARE = (5, 2, 7), 16, 40, 0.25
LAYOUT = vk.SegmentLayout([[length] for length in LENGTHS])


def stack(**options) -> Stack:
    return Stack(width=WIDTH, layers=2, heads=2, mlp_width=INNER, activation="relu", activation_dropout=SHARE, **options)


def rows() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("gated", [False, True])
def test_hidden_values_are_dropped_by_the_draw_of_their_place(gated):
    """The mask and its reciprocal, written out; the output map's own dropout is another site's."""
    part, rng, x = FeedForward(stack(gated=gated), itertools.count(11), "auto").double(), vk.Rng(7), rows()
    found = part(x, Context(LAYOUT, rng))
    hidden = F.linear(x, part.inner.weight, part.inner.bias)
    hidden = hidden.relu() if not gated else hidden[:, :INNER].relu() * hidden[:, INNER:]
    samples = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    kept = keep_columns(rng.state, 12, samples, positions, INNER, SHARE)
    assert 0.1 < (~kept).double().mean() < 0.4
    torch.testing.assert_close(found, F.linear(hidden * kept * dropout_scale(SHARE), part.output.weight))
    part.eval()
    torch.testing.assert_close(part(x, Context(LAYOUT, rng)), F.linear(hidden, part.output.weight))


def test_draws_belong_to_the_sample_whatever_batch_it_is_in():
    """So they survive accumulation and any number of ranks; another step draws others."""
    model, rng, x = PackedTransformer(stack(), itertools.count()).double(), vk.Rng(3), rows()
    whole = model(Tokens(x, LAYOUT), rng=rng).hidden.split(LENGTHS)
    for sample in (2, 0):
        alone = vk.SegmentLayout([[LENGTHS[sample]]], sample_ids=[sample])
        found = model(Tokens(x.split(LENGTHS)[sample], alone), rng=rng).hidden
        torch.testing.assert_close(found, whole[sample])
    rng.advance()
    assert (model(Tokens(x, LAYOUT), rng=rng).hidden - torch.cat(whole)).abs().max() > 1e-2


def test_stacks_without_it_draw_as_they_did():
    streams = itertools.count()
    FeedForward(Stack(width=WIDTH, heads=2, mlp_width=INNER), streams, "auto")
    assert next(streams) == 1
