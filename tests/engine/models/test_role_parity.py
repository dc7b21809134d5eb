"""Whole roles, from ids and pixels to what stands for a sample, against `transformers`: every parameter redrawn, ragged
texts, outputs and gradients in float64."""

import itertools

import pytest
import torch
import vlkernels as vk
from stack_parity import LENGTHS, InDouble, compare, copy_weights, redraw, visible

from engine.batch import Patches, Text
from engine.models.embedding.places import even_grid
from engine.models.roles import ImageTower, TextTower
from engine.sections import ImageStack, TextStack
from engine.weights import bert, vision

transformers = pytest.importorskip("transformers")

VOCAB, POSITIONS, LAYERS, PATCH, SIDE, PICTURES = 50, 16, 2, 4, 3, 2
SIZES = {"width": 24, "layers": LAYERS, "heads": 3, "mlp_width": 40, "eps": 1e-6}
THEIRS = {
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-6,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LAYOUT = vk.SegmentLayout([[n] for n in LENGTHS])


def ids_and_types() -> tuple[torch.Tensor, torch.Tensor]:
    shape = len(LENGTHS), max(LENGTHS)
    return torch.randint(1, VOCAB - 1, shape), torch.randint(2, shape)  # BERT gives id 0 no gradient


def boxes() -> torch.Tensor:
    corners = torch.randint(500, (len(LENGTHS), max(LENGTHS), 4))
    return corners + torch.tensor([0, 0, 500, 500])


def ragged_text(ids, types=None, places=None) -> Text:
    shown = visible()
    return Text(ids[shown], LAYOUT, None if types is None else types[shown], None if places is None else places[shown].int())


def text_tower(**options) -> TextTower:
    stack = TextStack(**SIZES, max_positions=POSITIONS, **options)
    return TextTower(stack, VOCAB, itertools.count(), "auto").double()


def image_tower(**options) -> ImageTower:
    stack = ImageStack(**SIZES, patch_size=PATCH, max_grid=(SIDE, SIDE), positions="learned", **options)
    return ImageTower(stack, itertools.count(), "auto").double()


def states_and_pooled(tower, *read) -> torch.Tensor:
    """All that a role gives: its states, and behind them what stands for each sample."""
    tokens = tower(*read, rng=None)
    return torch.cat((tokens.hidden, tower.pooled(tokens)))


@pytest.mark.parametrize("public", ["Bert", "LayoutLM"])
def test_a_text_role_is_bert_or_layoutlm(public):
    has_page = public == "LayoutLM"
    config_class, model_class = (getattr(transformers, f"{public}{kind}") for kind in ("Config", "Model"))
    config = config_class(**THEIRS, **NO_DROPOUT, vocab_size=VOCAB, max_position_embeddings=POSITIONS)
    with InDouble():
        theirs = redraw(model_class(config))
        ours = text_tower(
            types=2, norm="post", activation="gelu", pooling="pooler", page="sum" if has_page else None
        )
        pieces = copy_weights(ours, theirs, bert.text_tower(LAYERS, page=has_page))
        ids, types = ids_and_types()
        page = {"bbox": boxes()} if has_page else {}
        read = theirs(ids, attention_mask=visible().long(), token_type_ids=types, **page)
        expected = torch.cat((read.last_hidden_state[visible()], read.pooler_output))
        found = states_and_pooled(ours, ragged_text(ids, types, page.get("bbox")), LAYOUT)
        compare(ours, theirs, pieces, found, expected)


def test_a_causal_text_role_is_clips():
    config = transformers.CLIPTextConfig(
        **THEIRS, vocab_size=VOCAB, max_position_embeddings=POSITIONS, hidden_act="quick_gelu", eos_token_id=VOCAB - 1
    )
    theirs = transformers.CLIPTextModel(config)
    with InDouble():
        theirs = redraw(getattr(theirs, "text_model", theirs))
        ours = text_tower(embedding_norm=False, mask="causal", pooling="last", activation="quick_gelu")
        pieces = copy_weights(ours, theirs, vision.clip_text(LAYERS))
        ids, _ = ids_and_types()
        ids[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = VOCAB - 1  # CLIP pools its end of text
        read = theirs(ids)
        expected = torch.cat((read.last_hidden_state[visible()], read.pooler_output))
        compare(ours, theirs, pieces, states_and_pooled(ours, ragged_text(ids), LAYOUT), expected)


VISION = {
    "ViT": (
        {"class_token": True, "embedding_norm": False, "pooling": "pooler", "activation": "gelu"},
        NO_DROPOUT,
        lambda: vision.vit(LAYERS, pooler=True),
    ),
    "CLIPVision": (
        {"class_token": True, "patch_bias": False, "pooling": "first", "activation": "quick_gelu"},
        {},
        lambda: vision.clip(LAYERS),
    ),
    "SiglipVision": (
        {"embedding_norm": False, "pooling": "attention", "activation": "gelu_tanh"},
        {},
        lambda: vision.siglip(LAYERS),
    ),
}


@pytest.mark.parametrize("public", VISION)
def test_an_image_role_is_vit_or_clips_or_siglips(public):
    options, their_options, names = VISION[public]
    config_class, model_class = (getattr(transformers, f"{public}{kind}") for kind in ("Config", "Model"))
    theirs = model_class(config_class(**THEIRS, **their_options, image_size=SIDE * PATCH, patch_size=PATCH))
    with InDouble():
        theirs = redraw(getattr(theirs, "vision_model", theirs))
        ours = image_tower(**options)
        pieces = copy_weights(ours, theirs, names())
        pixels = torch.randn(PICTURES, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)
        layout = vk.SegmentLayout([[SIDE * SIDE]] * PICTURES)
        image = Patches(vk.patchify(pixels, layout, PATCH), even_grid(PICTURES, (SIDE, SIDE), pixels.device))
        read = theirs(pixels)
        states = read.last_hidden_state
        if public == "CLIPVision":  # whose last norm is for the pooled row alone
            states = theirs.post_layernorm(states)
        expected = torch.cat((states.flatten(0, 1), read.pooler_output))
        compare(ours, theirs, pieces, states_and_pooled(ours, image, layout), expected)
