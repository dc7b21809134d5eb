"""Initial weights have the spread that the published systems give them."""

import pytest
import torch

from engine.models import VisionLanguageModel
from engine.sections import DecoderStack, Distances, ImageStack, Model, TextStack

WIDTH, HEADS, LAYERS, MLP = 96, 4, 3, 384
SIZES = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "mlp_width": MLP}


def model(kind):
    torch.manual_seed(0)
    decoder = DecoderStack(**SIZES, source="text", relative_position=Distances(), norm_kind="rms")
    options = Model(ImageStack(**SIZES), TextStack(**SIZES), None, decoder=decoder, initialization=kind, initializer_range=0.02)
    return VisionLanguageModel(options, 512)


def spreads(of):
    block, cross = of.text.transformer.blocks[1], of.decoder.transformer.blocks[1].cross_attention
    weights = {
        "words": of.text.embedder.words,
        "positions": of.text.embedder.positions,
        "queries": block.self_attention.query_key_value.weight[:WIDTH],
        "values": block.self_attention.query_key_value.weight[2 * WIDTH :],
        "attended": block.self_attention.output.weight,
        "inner": block.feed_forward.inner.weight,
        "outer": block.feed_forward.output.weight,
        "cross queries": cross.query.weight,
        "cross keys": cross.key_value.weight[:WIDTH],
        "projection": of.text_head.projection.weight,
        "distances": next(of.decoder.transformer.distances.parameters()),
    }
    return {name: weight.std().item() for name, weight in weights.items()}


ALIKE = dict.fromkeys(("words", "positions", "queries", "values", "attended", "inner", "outer", "cross queries", "cross keys",
                       "projection", "distances"), 0.02)  # fmt: skip
DEEP, WIDE = (2 * LAYERS) ** -0.5, WIDTH**-0.5
EXPECTED = {
    "normal": ALIKE,
    "depth_scaled": ALIKE | {"attended": 0.02 * DEEP, "outer": 0.02 * DEEP},
    "clip": ALIKE | {"positions": 0.01, "queries": WIDE, "values": WIDE, "attended": WIDE * DEEP, "inner": WIDE * 2**-0.5,
                     "outer": WIDE * DEEP, "cross queries": WIDE, "cross keys": WIDE, "projection": WIDE},
    "xavier": ALIKE | dict.fromkeys(("queries", "values", "attended", "cross queries", "cross keys"), WIDE)
              | dict.fromkeys(("inner", "outer"), (2 / (WIDTH + MLP)) ** 0.5)
              | {"projection": (2 / (WIDTH + 128)) ** 0.5},
    "t5": ALIKE | {"words": 1.0, "queries": WIDE * (WIDTH // HEADS) ** -0.5, "values": WIDE, "attended": WIDE, "inner": WIDE,
                   "outer": MLP**-0.5, "cross queries": WIDE * (WIDTH // HEADS) ** -0.5, "cross keys": WIDE, "distances": WIDE},
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPECTED)
def test_spread(kind):
    found = spreads(model(kind))
    for name, expected in EXPECTED[kind].items():
        slack = 0.3 if name == "distances" else 0.05  # few numbers
        assert found[name] == pytest.approx(expected, rel=slack), name


@pytest.mark.parametrize("kind", EXPECTED)
def test_biases_begin_at_zero(kind):
    biases = [p for name, p in model(kind).named_parameters() if name.endswith("bias") and "norm" not in name]
    assert biases and not any(bias.any() for bias in biases)
