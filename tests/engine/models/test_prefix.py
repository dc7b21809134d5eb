"""A prefix stands in place of words: GPT-2 of `transformers`, given the same embeddings before those of its words, has the
same loss and gradients; patches through a linear map, as in BLIP-2 without queries, or a pooled picture, as in Frozen."""

import dataclasses

import pytest
import torch
import vlkernels as vk
from stack_parity import TOLERANCE, InDouble, copy_weights, redraw
from torch import nn

from engine.batch import Batch, Patches, Places, Text
from engine.models.model import VisionLanguageModel
from engine.objectives import add_heads
from engine.objectives.causal_language import CausalLanguage
from engine.objectives.parts.writing import NextWords
from engine.recipes import table
from engine.sections import DecoderStack, Distances, ImageStack, Model
from engine.training.optimizer import freeze
from engine.weights import gpt2

transformers = pytest.importorskip("transformers")

VOCAB, SIDE, LENGTHS = 40, 2, [4, 2, 7]
SIZES = {"width": 24, "layers": 2, "heads": 2, "mlp_width": 96, "activation": "gelu_tanh"}
PATCHES = {"patch_size": 2, "max_grid": (SIDE, SIDE), "positions": "learned"}
TOWER = ImageStack(**SIZES | {"width": 16}, **PATCHES, class_token=True)
BARE = ImageStack(**SIZES | {"width": 16, "layers": 0}, **PATCHES, final_norm=False)
DECODER = DecoderStack(**SIZES, max_positions=32, embedding_norm=False, source="image", reads="prefix")
CASES = {  # the tower, how the decoder reads it, and how many tokens it becomes
    "patches": (TOWER, {}, 1 + SIDE**2),
    "backbone alone": (BARE, {}, SIDE**2),
    "pooled": (BARE, {"pooled_prefix": 3}, 3),
}
OBJECTIVE = CausalLanguage()


def make(image: ImageStack, **reads) -> VisionLanguageModel:
    roles = {"text": None, "fusion": None, "image": image, "decoder": dataclasses.replace(DECODER, **reads)}
    model = VisionLanguageModel(Model(**roles), VOCAB)
    add_heads(model, {OBJECTIVE.name: OBJECTIVE})
    return redraw(model)


def batch() -> Batch:
    count, text = len(LENGTHS), vk.SegmentLayout([[n] for n in LENGTHS])
    ids = torch.randint(0, VOCAB, (sum(LENGTHS),))
    cells = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).repeat(count, 1).int()
    picture = Patches(torch.randn(count * SIDE**2, 12, dtype=torch.float64), cells)
    targets = [part[1:] for part in ids.split(LENGTHS)]
    places = Places.of_samples([Places.of_sample(torch.arange(len(part)).numpy()) for part in targets])
    view = NextWords(places, torch.cat(targets))
    numbers = torch.arange(count, dtype=torch.int32)
    whole = vk.SegmentLayout([[n, SIDE**2] for n in LENGTHS])
    views, counts = {OBJECTIVE.name: view}, {OBJECTIVE.name: len(view)}
    return Batch(whole, Text(ids, text), picture, numbers.long(), numbers, views, counts=counts)


def public_model(model: VisionLanguageModel) -> tuple[nn.Module, list]:
    """GPT-2 with the decoder's weights."""
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_inner": 96, "n_positions": 32, "vocab_size": VOCAB}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    theirs = redraw(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off)))
    decoder = nn.ModuleDict({"embedder": model.decoder.embedder, "transformer": model.decoder.transformer})
    pieces = [*gpt2.embedder("embedder", "transformer"), *gpt2.stack("transformer", "transformer", 2)]
    return theirs, copy_weights(decoder, theirs, pieces)


def prefix_rows(model: VisionLanguageModel, one: Batch) -> list[torch.Tensor]:
    """By hand, of every sample."""
    states = model.image_states(one)
    if model.decoder.pooled_prefix is None:
        return list(model.decoder.prefix(states.hidden).split(states.layout.lengths.sum(1).tolist()))
    pooled = states.hidden.unflatten(0, (len(LENGTHS), -1)).mean(1)
    return list(model.decoder.prefix(pooled).view(len(LENGTHS), -1, 24))


@pytest.mark.parametrize("case", CASES)
def test_a_prefix_is_as_words_are_to_the_public_model(case):
    image, reads, count = CASES[case]
    torch.manual_seed(3)
    model, one = make(image, **reads), batch()
    theirs, pieces = public_model(model)
    loss = OBJECTIVE(model, one)[0][OBJECTIVE.name]
    total = 0.0
    for prefix, ids in zip(prefix_rows(model, one), one.text.ids.split(LENGTHS), strict=True):
        assert len(prefix) == count
        embedded = torch.cat((prefix, theirs.transformer.wte(ids)))[None]
        with InDouble():
            logits = theirs(inputs_embeds=embedded).logits[0, count:-1]
        total = total + nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    expected = total / sum(n - 1 for n in LENGTHS)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    learning = dict(model.named_parameters())
    of_image = [name for name in learning if name.startswith(("image.", "decoder.prefix."))]
    wanted = torch.autograd.grad(expected, [learning[n] for n in of_image] + list(theirs.parameters()))
    loss.backward()
    for name, gradient in zip(of_image, wanted):
        assert gradient.abs().max() > 1e-9, name
        torch.testing.assert_close(learning[name].grad, gradient, **TOLERANCE)
    gradients = dict(zip((name for name, _ in theirs.named_parameters()), wanted[len(of_image) :], strict=True))
    for piece in pieces:
        torch.testing.assert_close(learning[f"decoder.{piece.ours}"].grad, piece.read(gradients), **TOLERANCE)


def test_blip2_without_queries_is_a_linear_map_of_patches():
    """Of the recipe, at its published size: what learns is the map, and the norm behind the frozen tower."""
    config = table.recipe("blip2_stage2", "--model.joint=null", "--model.decoder.source=image")
    model = table.model_of(config)
    freeze(config.optimizer.freeze, model.named_parameters())
    learning = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    norm = {f"image.transformer.final_norm.{part}": (1408,) for part in ("weight", "bias")}
    assert learning == norm | {"decoder.prefix.weight": (2560, 1408), "decoder.prefix.bias": (2560,)}


@pytest.mark.parametrize(
    "name, more, before",
    [
        ("blip2_stage2", [], 32),
        ("blip2_stage2", ["--model.joint=null", "--model.decoder.source=image"], 1 + 16 * 16),
        ("frozen", ["--model.decoder.positions=learned"], 2),
    ],
)
def test_positions_hold_prefix_and_text(name, more, before, capsys):
    text = table.recipe(name).data.max_caption_tokens
    table.recipe(name, *more, f"--model.decoder.max_positions={text + before}")
    with pytest.raises(SystemExit):
        table.recipe(name, *more, f"--model.decoder.max_positions={text + before - 1}")
    assert f"{text + before} tokens, must not exceed model.decoder.max_positions" in capsys.readouterr().err


def test_what_learns_of_frozen_are_its_backbone_and_two_maps():
    config = table.recipe("frozen")
    model = table.model_of(config)
    freeze(config.optimizer.freeze, model.named_parameters())
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.startswith(("image.embedder.", "decoder.prefix.")) for name in learning)
    assert sum(dict(model.named_parameters())[name].numel() for name in learning) == (
        25_557_032 - 2_049_000 + (2048 + 1) * 2048 + (2048 + 1) * 2 * 4096
    )


def test_relative_bias_counts_through_the_prefix():
    """With a bias by distance alone a picture's last token is as near to the first word as a word before it would be."""
    near = Distances(count=4, max_distance=4, bidirectional=False)
    model, one = make(BARE, relative_position=near, positions="none"), batch()
    states = model.decoder_states(one).hidden
    words = model.decoder.embedder.words
    rows = [torch.cat((p, words[ids])) for p, ids in zip(prefix_rows(model, one), one.text.ids.split(LENGTHS))]
    together = vk.SegmentLayout([[len(part)] for part in rows])
    tokens = type(model.image_states(one))(torch.cat(rows), together)
    expected = model.decoder.transformer(tokens, mask=vk.SegmentMask.causal()).hidden
    torch.testing.assert_close(states, expected, **TOLERANCE)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pooled_prefix": 2, "reads": "attention"}, "needs source image and reads prefix, got image and attention"),
        ({"pooled_prefix": 2, "source": "joint"}, "needs source image and reads prefix, got joint and prefix"),
        ({"pooled_prefix": 0}, "model.decoder.pooled_prefix must be positive, got 0"),
        ({"layers": 0}, "model.decoder.layers must be at least 1, got 0"),
    ],
)
def test_prefixes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DECODER, **options)
