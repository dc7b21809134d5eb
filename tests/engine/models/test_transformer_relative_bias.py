"""Stacks with a relative bias against those of `transformers` with the same weights, every parameter redrawn."""

import itertools

import pytest
import torch
import vlkernels as vk
from stack_parity import (
    LENGTHS,
    SOURCE_LENGTHS,
    InDouble,
    compare,
    copy_weights,
    gradients_everywhere,
    layout_of,
    named,
    padded_rows,
    ragged,
    redraw,
    visible,
)

from engine.models.transformer import PackedTransformer, Source, Tokens
from engine.sections import Distances, Stack
from engine.weights import layoutlmv2, t5

transformers = pytest.importorskip("transformers")

WIDTH, LAYERS = 32, 3
SIZES = {"width": WIDTH, "layers": LAYERS, "heads": 4, "mlp_width": 48, "eps": 1e-6}


def t5_stack(decoder=False, gated=False, **options):
    theirs = transformers.models.t5.modeling_t5.T5Stack(
        transformers.T5Config(
            vocab_size=2, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4, dropout_rate=0.0,
            relative_attention_num_buckets=8, relative_attention_max_distance=6, is_decoder=decoder, use_cache=False,
            feed_forward_proj="gated-gelu" if gated else "relu",
        )
    )  # fmt: skip
    theirs.set_input_embeddings(None)
    stack = Stack(
        **SIZES, norm="pre", norm_kind="rms", biases="none", activation="gelu_tanh" if gated else "relu", gated=gated,
        softmax_scale=1.0, relative_position=Distances(8, 6, bidirectional=not decoder), **options,
    )  # fmt: skip
    ours = PackedTransformer(stack, itertools.count(), source_width=WIDTH if decoder else None).double()
    return ours, redraw(theirs), t5.stack("ours", "encoder", LAYERS, decoder=decoder, gated=gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_t5_encoder(gated, recompute):
    ours, theirs, names = t5_stack(gated=gated)
    ours.activation_checkpointing = recompute
    pieces = copy_weights(*named(ours, theirs), names)
    hidden = padded_rows(len(LENGTHS), max(LENGTHS), WIDTH)
    with InDouble():
        expected = theirs(inputs_embeds=hidden, attention_mask=visible().long()).last_hidden_state
    states = ours(Tokens(ragged(hidden), layout_of()))
    compare(*named(ours, theirs), pieces, states.hidden, ragged(expected))


def test_t5_decoder():
    ours, theirs, names = t5_stack(decoder=True)
    pieces = copy_weights(*named(ours, theirs), names)
    hidden = padded_rows(len(LENGTHS), max(LENGTHS), WIDTH)
    read = padded_rows(len(LENGTHS), max(SOURCE_LENGTHS), WIDTH).requires_grad_()
    with InDouble():
        expected = theirs(
            inputs_embeds=hidden, encoder_hidden_states=read, encoder_attention_mask=visible(SOURCE_LENGTHS).long()
        ).last_hidden_state
    own = ragged(read.detach(), SOURCE_LENGTHS).requires_grad_()
    source = Source(ours.project_source(own), layout_of(SOURCE_LENGTHS))
    states = ours(Tokens(ragged(hidden), layout_of()), mask=vk.SegmentMask.causal(), source=source)
    compare(*named(ours, theirs), pieces, states.hidden, ragged(expected))
    torch.testing.assert_close(own.grad, ragged(read.grad, SOURCE_LENGTHS), rtol=1e-9, atol=1e-9)


def test_layoutlmv2_encoder():
    """Text and an image of two regions, in one stream."""
    from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2Encoder

    config = transformers.LayoutLMv2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48, hidden_act="gelu",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-6, fast_qkv=True,
        rel_pos_bins=8, max_rel_pos=6, rel_2d_pos_bins=12, max_rel_2d_pos=60,
    )  # fmt: skip
    theirs = redraw(LayoutLMv2Encoder(config))
    stack = Stack(
        **SIZES, norm="post", activation="gelu", biases="no_key", relative_position=Distances(8, 6),
        relative_box=Distances(12, 60),
    )  # fmt: skip
    ours = PackedTransformer(stack, itertools.count()).double()
    pieces = copy_weights(*named(ours, theirs), layoutlmv2.stack("ours", "encoder", LAYERS))

    regions, longest = 2, max(LENGTHS) + 2
    hidden = padded_rows(len(LENGTHS), longest, WIDTH)
    boxes = torch.randint(0, 100, (len(LENGTHS), longest, 4))
    own_rows = torch.cat([visible(), torch.ones(len(LENGTHS), regions, dtype=torch.bool)], dim=1)
    position = torch.cat([torch.arange(max(LENGTHS)), torch.arange(regions)]).expand(len(LENGTHS), -1)
    with InDouble(), gradients_everywhere():
        expected = theirs(hidden, ~own_rows[:, None, None], bbox=boxes, position_ids=position).last_hidden_state
    layout = vk.SegmentLayout([[n, regions] for n in LENGTHS])
    states = ours(Tokens(hidden[own_rows], layout), boxes=boxes[own_rows].int())
    compare(*named(ours, theirs), pieces, states.hidden, expected[own_rows])
