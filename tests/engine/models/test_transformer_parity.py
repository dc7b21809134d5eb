"""The packed transformer against `transformers`' own modules with the same weights, every parameter
redrawn."""

import itertools

import pytest
import torch
import vlkernels as vk
from torch import nn

from engine.models.transformer import PackedTransformer, Source, Tokens
from engine.sections import Stack

transformers = pytest.importorskip("transformers")

LENGTHS = [5, 1, 9, 3]
WIDTH, HEADS, LAYERS, INNER, VOCAB, POSITIONS = 32, 4, 3, 48, 50, 16


def redraw(module: nn.Module) -> None:
    """Default initialisation is blind to swapped norms and lost biases: matrices 0.25, vectors 0.5, nothing
    spared."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.25 if parameter.dim() >= 2 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)


def copy_weights(pairs: list[tuple[nn.Parameter, list[nn.Parameter]]]) -> None:
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(torch.cat([p.detach() for p in theirs]))


def compare_gradients(pairs: list[tuple[nn.Parameter, list[nn.Parameter]]]) -> None:
    for ours, theirs in pairs:
        expected = torch.cat([p.grad for p in theirs])
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(ours.grad, expected, rtol=1e-9, atol=1e-9)


def attention_weights(ours, query, key, value, output) -> list:
    return [
        (ours.query_key_value.weight, [query.weight, key.weight, value.weight]),
        (ours.query_key_value.bias, [query.bias, key.bias, value.bias]),
        (ours.output.weight, [output.weight]),
        (ours.output.bias, [output.bias]),
    ]


def linear_weights(ours, theirs) -> list:
    return [(ours.weight, [theirs.weight]), (ours.bias, [theirs.bias])]


def ragged_rows(padded: torch.Tensor) -> torch.Tensor:
    return torch.cat([row[:length] for row, length in zip(padded, LENGTHS, strict=True)])


def bert_weights(stack: PackedTransformer, bert) -> list:
    pairs = []
    for block, layer in zip(stack.blocks, bert.encoder.layer, strict=True):
        attention = layer.attention
        pairs += attention_weights(
            block.self_attention,
            attention.self.query,
            attention.self.key,
            attention.self.value,
            attention.output.dense,
        )
        pairs += linear_weights(block.self_attention.norm, attention.output.LayerNorm)
        pairs += linear_weights(block.feed_forward.inner, layer.intermediate.dense)
        pairs += linear_weights(block.feed_forward.output, layer.output.dense)
        pairs += linear_weights(block.feed_forward.norm, layer.output.LayerNorm)
    return pairs


@pytest.mark.parametrize("recompute", [False, True])
def test_post_norm_stack_is_bert(recompute):
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        type_vocab_size=1,
        layer_norm_eps=1e-6,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).double()
    redraw(bert)
    stack = Stack(
        width=WIDTH, layers=LAYERS, heads=HEADS, mlp_width=INNER, norm="post", eps=1e-6, activation="gelu"
    )
    ours = PackedTransformer(stack, itertools.count()).double()
    ours.activation_checkpointing = recompute
    weights = bert_weights(ours, bert)
    assert sum(p.numel() for p, _ in weights) == sum(p.numel() for p in ours.parameters())
    copy_weights(weights)

    ids = torch.randint(1, VOCAB, (len(LENGTHS), max(LENGTHS)))  # BERT gives id 0 no gradient
    visible = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    expected = ragged_rows(bert(ids, attention_mask=visible.long()).last_hidden_state)
    layout = vk.SegmentLayout([[n] for n in LENGTHS])
    hidden = ours(Tokens(ragged_rows(bert.embeddings(ids)).detach(), layout)).hidden
    torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)

    upstream = torch.randn_like(expected)
    hidden.backward(upstream)
    expected.backward(upstream)
    compare_gradients(weights)


def test_pre_norm_causal_stack_is_clips_text_tower():
    """quick_gelu, a causal table, a final norm; the embedding norm is CLIP's own only in its image tower."""
    config = transformers.CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
        hidden_act="quick_gelu",
        bos_token_id=1,
        eos_token_id=VOCAB - 1,
        pad_token_id=0,
    )
    clip = transformers.CLIPTextModel(config).double()
    clip = getattr(clip, "text_model", clip)
    redraw(clip)
    stack = Stack(
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        mlp_width=INNER,
        norm="pre",
        eps=1e-6,
        activation="quick_gelu",
    )
    ours = PackedTransformer(stack, itertools.count()).double()
    weights = linear_weights(ours.final_norm, clip.final_layer_norm)
    for block, layer in zip(ours.blocks, clip.encoder.layers, strict=True):
        attention = layer.self_attn
        weights += attention_weights(
            block.self_attention, attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
        )
        weights += linear_weights(block.self_attention.norm, layer.layer_norm1)
        weights += linear_weights(block.feed_forward.norm, layer.layer_norm2)
        weights += linear_weights(block.feed_forward.inner, layer.mlp.fc1)
        weights += linear_weights(block.feed_forward.output, layer.mlp.fc2)
    assert sum(p.numel() for p, _ in weights) == sum(p.numel() for p in ours.parameters())
    copy_weights(weights)

    ids = torch.randint(2, VOCAB - 1, (len(LENGTHS), max(LENGTHS)))
    expected = ragged_rows(clip(ids).last_hidden_state)
    embedded = ragged_rows(clip.embeddings(ids)).detach().requires_grad_()
    layout = vk.SegmentLayout([[n] for n in LENGTHS])
    hidden = ours(Tokens(embedded, layout), mask=vk.SegmentMask.causal()).hidden
    torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)

    upstream = torch.randn_like(expected)
    hidden.backward(upstream)
    expected.backward(upstream)
    compare_gradients(weights)


def test_cross_attention_is_berts_decoder():
    """Self-attention, cross-attention to ragged sources, feed-forward: BERT with `add_cross_attention`."""
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        type_vocab_size=1,
        layer_norm_eps=1e-6,
        is_decoder=True,
        add_cross_attention=True,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).double()
    redraw(bert)
    stack = Stack(
        width=WIDTH, layers=2, heads=HEADS, mlp_width=INNER, norm="post", eps=1e-6, activation="gelu"
    )
    ours = PackedTransformer(stack, itertools.count(), source_width=WIDTH).double()
    weights = []
    for block, layer in zip(ours.blocks, bert.encoder.layer, strict=True):
        own, cross = layer.attention, layer.crossattention
        weights += attention_weights(
            block.self_attention, own.self.query, own.self.key, own.self.value, own.output.dense
        )
        weights += linear_weights(block.self_attention.norm, own.output.LayerNorm)
        weights += linear_weights(block.cross_attention.query, cross.self.query)
        weights += [
            (block.cross_attention.key_value.weight, [cross.self.key.weight, cross.self.value.weight]),
            (block.cross_attention.key_value.bias, [cross.self.key.bias, cross.self.value.bias]),
        ]
        weights += linear_weights(block.cross_attention.output, cross.output.dense)
        weights += linear_weights(block.cross_attention.norm, cross.output.LayerNorm)
        weights += linear_weights(block.feed_forward.inner, layer.intermediate.dense)
        weights += linear_weights(block.feed_forward.output, layer.output.dense)
        weights += linear_weights(block.feed_forward.norm, layer.output.LayerNorm)
    assert sum(p.numel() for p, _ in weights) == sum(p.numel() for p in ours.parameters())
    copy_weights(weights)

    source_lengths, index = [7, 2, 4], torch.tensor([2, 0, 0, 1])
    source = torch.randn(sum(source_lengths), WIDTH, dtype=torch.float64)
    padded = nn.utils.rnn.pad_sequence(source.split(source_lengths), batch_first=True)[index]
    source_visible = (torch.arange(max(source_lengths)) < torch.tensor(source_lengths)[:, None])[index]
    embedded = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, dtype=torch.float64)
    embedded = bert.embeddings(inputs_embeds=embedded).detach()
    expected = ragged_rows(
        bert.encoder(
            embedded,
            attention_mask=torch.ones(max(LENGTHS), max(LENGTHS), dtype=torch.bool).tril()[None, None],
            encoder_hidden_states=padded,
            encoder_attention_mask=source_visible[:, None, None],
            past_key_values=None,
            use_cache=False,
        ).last_hidden_state
    )
    layout, source_layout = (
        vk.SegmentLayout([[n] for n in lengths]) for lengths in (LENGTHS, source_lengths)
    )
    read = Source(ours.project_source(source), source_layout, index.to(torch.int32))
    hidden = ours(Tokens(ragged_rows(embedded), layout), mask=vk.SegmentMask.causal(), source=read).hidden
    torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)

    upstream = torch.randn_like(expected)
    hidden.backward(upstream)
    expected.backward(upstream)
    compare_gradients(weights)
