"""Stacks of every family against those of `transformers` with the same weights, every parameter redrawn."""

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
    layout_of,
    named,
    padded_rows,
    ragged,
    redraw,
    visible,
)
from torch import nn

from engine.models.transformer import PackedTransformer, SelectedRows, Source, Tokens
from engine.sections import Stack
from engine.weights import albert, bart, bert, gpt2, q_former, vision
from engine.weights.pieces import linear

transformers = pytest.importorskip("transformers")

WIDTH, LAYERS, HEADS, INNER = 32, 3, 4, 48
SIZES = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp_width": INNER, "eps": 1e-6}
BERT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}  # fmt: skip
CAUSAL = vk.SegmentMask.causal()
EAGER = {"attn_implementation": "eager"}


def packed(norm, activation, *, source_width=None, cross_every=1, groups=(), **options):
    stack = Stack(**SIZES, norm=norm, activation=activation, **options)
    built = {"source_width": source_width, "cross_every": cross_every, "groups": groups}
    return PackedTransformer(stack, itertools.count(), **built).double()


def padded_batch(lengths=LENGTHS):
    return padded_rows(len(lengths), max(lengths), WIDTH)


def compare_alone(ours, theirs, pieces, run, mask=None):
    hidden = padded_batch()
    with InDouble():
        expected = ragged(run(hidden))
    states = ours(Tokens(ragged(hidden), layout_of()), mask=mask)
    compare(*named(ours, theirs), pieces, states.hidden, expected)


def additive(seen):
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)


def keys_mask(lengths):
    return additive(visible(lengths)[:, None, None])


def test_bert_encoder():
    theirs = redraw(transformers.models.bert.modeling_bert.BertEncoder(transformers.BertConfig(**BERT)))
    ours = packed("post", "gelu")
    pieces = copy_weights(*named(ours, theirs), bert.stack("ours", LAYERS))
    compare_alone(ours, theirs, pieces, lambda x: theirs(x, attention_mask=keys_mask(LENGTHS)).last_hidden_state)


def test_gpt2():
    config = transformers.GPT2Config(
        vocab_size=2, n_positions=16, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=1e-6, activation_function="gelu_new", use_cache=False,
    )  # fmt: skip
    theirs = redraw(transformers.GPT2Model(config))
    theirs.wpe.weight.data.zero_()  # positions are an embedder's
    theirs.wte, theirs.wpe = nn.Identity(), frozen(theirs.wpe)
    ours = packed("pre", "gelu_tanh")
    pieces = copy_weights(*named(ours, theirs), gpt2.stack("ours", "encoder", LAYERS))
    compare_alone(ours, theirs, pieces, lambda x: theirs(inputs_embeds=x).last_hidden_state, CAUSAL)


def frozen(module):
    """Its parameters become buffers, which nobody compares."""
    for name, parameter in list(module.named_parameters()):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
    return module


def bart_config():
    return transformers.BartConfig(
        vocab_size=3, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, max_position_embeddings=16,
        dropout=0.0, attention_dropout=0.0, activation_function="gelu", use_cache=False, pad_token_id=1, **EAGER,
    )  # fmt: skip


@pytest.mark.parametrize("decoder", [False, True])
def test_bart(decoder):
    modeling = transformers.models.bart.modeling_bart
    theirs = redraw((modeling.BartDecoder if decoder else modeling.BartEncoder)(bart_config()))
    for part in ("embed_tokens", "embed_positions", "layernorm_embedding"):
        frozen(getattr(theirs, part))
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    ours = packed("post", "gelu", source_width=WIDTH if decoder else None)
    pieces = copy_weights(*named(ours, theirs), bart.stack("ours", "encoder", LAYERS, decoder=decoder))

    # What the frozen embeddings and their norm make of rows goes into both sides.
    def embedded(rows):
        position = theirs.embed_positions(torch.empty(rows.shape[:2]))
        return theirs.layernorm_embedding(rows + position)

    if decoder:
        read = padded_batch(SOURCE_LENGTHS).requires_grad_()
        rows, more = padded_batch(), {"encoder_hidden_states": read, "encoder_attention_mask": visible(SOURCE_LENGTHS).long()}
        own = ragged(read.detach(), SOURCE_LENGTHS).requires_grad_()
        source = {"source": Source(ours.project_source(own), layout_of(SOURCE_LENGTHS)), "mask": CAUSAL}
    else:
        rows, more, source = padded_batch(), {}, {}
    expected = theirs(inputs_embeds=rows, attention_mask=visible().long(), **more).last_hidden_state
    states = ours(Tokens(ragged(embedded(rows)), layout_of()), **source)
    compare(*named(ours, theirs), pieces, states.hidden, ragged(expected))


@pytest.mark.parametrize("recompute", [False, True])
def test_albert(recompute):
    config = transformers.AlbertConfig(**BERT | {"hidden_act": "gelu_new"}, vocab_size=3, embedding_size=WIDTH)
    theirs = redraw(transformers.models.albert.modeling_albert.AlbertTransformer(config))
    theirs.embedding_hidden_mapping_in = nn.Identity()
    ours = packed("post", "gelu_tanh", shared=True)
    ours.activation_checkpointing = recompute
    pieces = copy_weights(*named(ours, theirs), albert.stack("ours", "encoder"))
    compare_alone(ours, theirs, pieces, lambda x: theirs(x, attention_mask=keys_mask(LENGTHS)).last_hidden_state)


def test_clip_without_a_final_norm():
    """The towers' encoder: what a stack gives whose final norm is somebody else's."""
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INNER,
        layer_norm_eps=1e-6, attention_dropout=0.0, hidden_act="quick_gelu",
    )  # fmt: skip
    theirs = redraw(transformers.models.clip.modeling_clip.CLIPEncoder(config))
    ours = packed("pre", "quick_gelu", final_norm=False)
    pieces = copy_weights(*named(ours, theirs), vision.stack("ours", "encoder.layers", LAYERS, vision.CLIP_BLOCK))
    compare_alone(ours, theirs, pieces, lambda x: theirs(inputs_embeds=x, attention_mask=keys_mask(LENGTHS)).last_hidden_state)


def test_blip_text_decoder():
    """Causal self-attention, cross-attention in every layer. All sources are as long as images are: this version of
    `transformers` loses the mask of the others."""
    config = transformers.BlipTextConfig(**BERT, encoder_hidden_size=WIDTH, vocab_size=3, **EAGER)
    theirs = redraw(transformers.models.blip.modeling_blip_text.BlipTextEncoder(config))
    ours = packed("post", "gelu", source_width=WIDTH)
    pieces = copy_weights(*named(ours, theirs), bert.stack("ours", LAYERS, crosses=True))
    causal = torch.ones(max(LENGTHS), max(LENGTHS), dtype=torch.bool).tril()
    mask = additive(causal & visible()[:, None, None])
    lengths = [4] * len(LENGTHS)
    hidden, read = padded_batch(), padded_batch(lengths)
    expected = theirs(hidden, attention_mask=mask, encoder_hidden_states=read, use_cache=False).last_hidden_state
    source = Source(ours.project_source(ragged(read, lengths)), layout_of(lengths))
    states = ours(Tokens(ragged(hidden), layout_of()), mask=CAUSAL, source=source)
    compare(*named(ours, theirs), pieces, states.hidden, ragged(expected))


QUERIES = 3
QFORMER_MASKS = {
    "matching": vk.SegmentMask.full(2),
    "generation": vk.SegmentMask.prefix_lm(),
    "contrastive": vk.SegmentMask.block_diagonal([1, 1]),
}


@pytest.mark.parametrize("task", QFORMER_MASKS)
def test_qformer(task):
    """Queries and text in one stream under the three tables; queries alone read the image, in every second layer."""
    config = transformers.Blip2QFormerConfig(
        **BERT, cross_attention_frequency=2, encoder_hidden_size=WIDTH, use_qformer_text_input=True, **EAGER
    )
    theirs = redraw(transformers.models.blip_2.modeling_blip_2.Blip2QFormerEncoder(config))
    ours = packed("post", "gelu", source_width=WIDTH, cross_every=2, groups=((0,), (1,)))
    pieces = copy_weights(*named(ours, theirs), q_former.stack("ours", "encoder", LAYERS, 2))
    mask = QFORMER_MASKS[task]
    layout = vk.SegmentLayout([[QUERIES, n] for n in LENGTHS])
    rows = torch.cat([torch.ones(len(LENGTHS), QUERIES, dtype=torch.bool), visible()], dim=1)
    hidden, read = padded_rows(*rows.shape, WIDTH), padded_batch(SOURCE_LENGTHS)
    seen = torch.zeros(len(LENGTHS), rows.shape[1], rows.shape[1], dtype=torch.bool)
    own = mask.dense(layout)
    for sample, start in enumerate(layout.starts[:, 0].tolist()):
        length = QUERIES + LENGTHS[sample]
        seen[sample, :length, :length] = own[start : start + length, start : start + length]
    expected = theirs(
        hidden, attention_mask=additive(seen[:, None]), encoder_hidden_states=read, query_length=QUERIES,
        encoder_attention_mask=keys_mask(SOURCE_LENGTHS),
    ).last_hidden_state  # fmt: skip
    source = Source(ours.project_source(ragged(read, SOURCE_LENGTHS)), layout_of(SOURCE_LENGTHS))
    states = ours(Tokens(hidden[rows], layout), mask=mask, source=source)
    compare(*named(ours, theirs), pieces, states.hidden, expected[rows])


@pytest.mark.parametrize("segments", [(0,), (1,), (0, 1)])
def test_qformer_of_some_segments(segments):
    """The last layer of a pass that is asked for queries or for text alone runs their network alone."""
    ours = redraw(packed("post", "gelu", source_width=WIDTH, cross_every=2, groups=((0,), (1,))))
    layout = vk.SegmentLayout([[QUERIES, n] for n in LENGTHS])
    hidden, read = padded_rows(layout.num_tokens, WIDTH), padded_rows(sum(SOURCE_LENGTHS), WIDTH)
    mask = vk.SegmentMask.prefix_lm()
    source = Source(ours.project_source(read), layout_of(SOURCE_LENGTHS))
    whole = ours(Tokens(hidden, layout), mask=mask, source=source).hidden
    chosen = SelectedRows.whole(layout, segments)
    run = []
    for number, network in enumerate(ours.blocks[-1].feed_forwards):
        network.register_forward_hook(lambda *_, n=number: run.append(n))
    states = ours(Tokens(hidden, layout), mask=mask, source=source, selected=chosen)
    torch.testing.assert_close(states.hidden, whole[chosen.index], rtol=1e-9, atol=1e-9)
    assert run == list(segments)


def test_names_that_were_not_asked_for_are_noticed():
    pieces = list(linear("a", "b", "c"))
    saved = {"b.weight": torch.ones(2, 3), "c.weight": torch.zeros(1, 3), "b.bias": torch.ones(2), "c.bias": torch.zeros(1)}
    assert pieces[0].read(saved).shape == (3, 3) and pieces[1].read(saved).tolist() == [1, 1, 0]
    with pytest.raises(KeyError, match="c.weight"):
        pieces[0].read({"b.weight": torch.ones(2, 3)})
