"""A pass that is asked for some tokens: their states and gradients are those of the whole pass."""

import itertools

import pytest
import torch
import vlkernels as vk
from random_pairs import VIEWS, region_batch, small_one_stream
from stack_parity import redraw

from engine.batch import IMAGE, TEXT
from engine.models.transformer import PackedTransformer, SelectedRows, Source, Tokens
from engine.sections import Distances, Stack

WIDTH, LENGTHS = 32, [[5], [1], [7], [3]]
PLACES = [(0, 1), (0, 4), (2, 0), (2, 5), (2, 6), (3, 2)]


def transformer(norm="post", dropout=0.0, layers=2, source_width=None):
    torch.manual_seed(0)
    stack = Stack(
        width=WIDTH, layers=layers, heads=4, mlp_width=64, norm=norm, eps=1e-6, activation="gelu",
        dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip
    return PackedTransformer(stack, itertools.count(), source_width=source_width).double()


def tokens(lengths=LENGTHS, sample_ids=None):
    layout = vk.SegmentLayout(lengths, sample_ids=sample_ids)
    hidden = torch.randn(layout.num_tokens, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Tokens(hidden, layout)


def selection(layout, places=PLACES):
    samples, offsets = torch.tensor(places, dtype=torch.long).view(-1, 2).T
    return SelectedRows.of(layout.starts[samples, 0] + offsets, samples.contiguous(), layout)


def states_and_gradients(model, read, states):
    """Of a sum that weighs every value differently."""
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    gradients = torch.autograd.grad((states * weights).sum(), [read.hidden, *model.parameters()], allow_unused=True)
    return [states, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("crossing", [False, True])
def test_states_and_gradients_are_those_of_the_whole_pass(norm, layers, recompute, crossing):
    model, read = transformer(norm, layers=layers, source_width=WIDTH if crossing else None), tokens()
    model.activation_checkpointing = recompute
    read.hidden.requires_grad_()
    chosen = selection(read.layout)
    other = tokens([[2], [4], [1], [3]])
    source = {"source": Source(model.project_source(other.hidden), other.layout)} if crossing else {}
    expected = states_and_gradients(model, read, model(read, **source).hidden[chosen.index])
    source = {"source": Source(model.project_source(other.hidden), other.layout)} if crossing else {}
    selected = model(read, selected=chosen, **source)
    assert selected.layout.lengths.tolist() == [[2], [0], [3], [1]]
    for mine, whole in zip(states_and_gradients(model, read, selected.hidden), expected, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-9, atol=1e-10)


def test_the_last_block_computes_the_selected_rows_only():
    model, read = transformer(), tokens()
    rows = []
    for block in model.blocks:
        block.feed_forward.inner.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    model(read, selected=selection(read.layout))
    assert rows == [read.layout.num_tokens, len(PLACES)]


def test_dropout_follows_the_sample():
    """A sample drops the same whatever batch it is read in."""
    model, rng = transformer(dropout=0.3), vk.Rng(5)
    read = tokens(sample_ids=[10, 11, 12, 13])
    together = model(read, rng=rng, selected=selection(read.layout)).hidden
    third = Tokens(read.hidden[6:13], vk.SegmentLayout(LENGTHS[2:3], sample_ids=[12]))
    alone = model(third, rng=rng, selected=selection(third.layout, [(0, offset) for _, offset in PLACES[2:5]]))
    torch.testing.assert_close(together[2:5], alone.hidden)
    kept = model.eval()(read, selected=selection(read.layout)).hidden
    assert not torch.isclose(together, kept).all(), "nothing was dropped"


def test_nothing_selected():
    model, read = transformer(), tokens()
    read.hidden.requires_grad_()
    states = model(read, selected=selection(read.layout, [])).hidden
    assert states.shape == (0, WIDTH)
    states.sum().backward()
    assert not read.hidden.grad.any() and not model.blocks[-1].feed_forward.inner.weight.grad.any()


def segmented(**options):
    """A stack under a table of two segments, and its tokens."""
    torch.manual_seed(0)
    stack = Stack(width=WIDTH, layers=2, heads=4, mlp_width=64, norm="post", activation="gelu", **options)
    layout = vk.SegmentLayout([[3, 2], [0, 4], [2, 5]])
    hidden = torch.randn(layout.num_tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    return redraw(PackedTransformer(stack, itertools.count())), Tokens(hidden, layout)


@pytest.mark.parametrize("options", [{}, {"relative_position": Distances(8, 6), "biases": "none"}])
@pytest.mark.parametrize("segments", [(0,), (1,), (0, 1)])
def test_whole_segments_under_a_causal_table_and_a_relative_bias(segments, options):
    model, read = segmented(**options)
    chosen = SelectedRows.whole(read.layout, segments)
    rows = vk.take_segments(torch.arange(read.layout.num_tokens), read.layout, segments)
    mask = vk.SegmentMask.prefix_lm()
    expected = states_and_gradients(model, read, model(read, mask=mask).hidden[rows])
    states = model(read, mask=mask, selected=chosen).hidden
    for mine, whole in zip(states_and_gradients(model, read, states), expected, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-9, atol=1e-10)


def test_single_rows_of_a_segment_under_a_table():
    model, read = segmented(relative_position=Distances(8, 6))
    mask = vk.SegmentMask([["full", "none"], ["full", "full"]])
    samples, offsets = torch.tensor([[0, 1, 2, 2], [1, 0, 2, 4]])
    chosen = SelectedRows.of(read.layout.starts[samples, 1] + offsets, samples, read.layout, segment=1)
    expected = model(read, mask=mask).hidden[chosen.index]
    torch.testing.assert_close(model(read, mask=mask, selected=chosen).hidden, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("segment", [TEXT, IMAGE])
def test_one_stream_reads_what_is_masked(segment):
    model, batch = small_one_stream(dtype=torch.float64), region_batch(range(5))
    view = VIEWS[segment]
    rows = batch.views[view].places.rows(batch.layout, segment)
    torch.testing.assert_close(model.masked_states(batch, view), model.joint_states(batch, view).hidden[rows])
