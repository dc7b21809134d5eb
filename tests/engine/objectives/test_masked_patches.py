"""Masked autoencoding against `transformers`: every parameter redrawn, the same patches hidden, loss and gradients."""

import math

import numpy as np
import pytest
import torch
import vlkernels as vk
from stack_parity import InDouble, redraw

from engine.batch import Batch, Patches, Places
from engine.models import VisionLanguageModel
from engine.models.embedding.places import even_grid
from engine.objectives import add_heads
from engine.objectives.masked_patches import KeptPatches, MaskedPatches, normalised
from engine.sections import ImageStack, Model
from engine.weights import vision

transformers = pytest.importorskip("transformers")

PICTURES, SIDE, PATCH, LAYERS = 3, 4, 4, 2
COUNT, EPS = SIDE * SIDE, 1e-12
KEPT = [[0, 3, 6, 9], [1, 2, 3, 15], [4, 5, 10, 11]]


def places(width):
    """Of each patch: sines of its column, cosines of it, sines of its row, cosines of it."""
    quarter = width // 4
    rates = [10_000 ** -(wave / quarter) for wave in range(quarter)]
    return [
        [turn(axis * rate) for axis in (column, row) for turn in (math.sin, math.cos) for rate in rates]
        for row in range(SIDE)
        for column in range(SIDE)
    ]


def their_model():
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 40, "layer_norm_eps": EPS}
    small = {"hidden_size": 32, "decoder_hidden_size": 24, "decoder_num_hidden_layers": LAYERS,
             "decoder_num_attention_heads": 2, "decoder_intermediate_size": 96}  # fmt: skip
    pictures = {"image_size": SIDE * PATCH, "patch_size": PATCH, "norm_pix_loss": True}
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes, **small, **pictures))
    redraw(model)
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.data.copy_(torch.tensor([[0.0] * table.shape[-1], *places(table.shape[-1])]))
    return model


def our_model():
    image = ImageStack(
        width=32, heads=4, layers=LAYERS, mlp_width=40, eps=EPS, activation="gelu", patch_size=PATCH, max_grid=(SIDE, SIDE),
        positions="sinusoidal", class_token=True, embedding_norm=False, pooling="first",
    )  # fmt: skip
    model = VisionLanguageModel(Model(image, None, None), vocab_size=8)
    objective = MaskedPatches(width=24, layers=LAYERS, heads=2)
    add_heads(model, {objective.name: objective})
    return model.double(), objective


def copied(model, theirs):
    """Pairs of our parameters and what is theirs: all of either that learn."""
    saved = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    parts = (
        (model.image, "vit.", vision.vit(LAYERS, pooler=False, learned_positions=False)),
        (model.heads["masked_patches"], "decoder.", vision.mae_decoder(LAYERS)),
    )
    found = []
    for ours, prefix, pieces in parts:
        parameters = dict(ours.named_parameters())
        for piece in pieces:
            piece = piece._replace(theirs=tuple(prefix + name for name in piece.theirs))
            parameter = parameters.pop(piece.ours)
            parameter.data.copy_(piece.read(saved))
            written = piece.write(parameter.data)
            assert all(torch.equal(written[name], saved[name]) for name in piece.theirs)
            found.append((parameter, piece))
        assert not parameters
    waves = (
        (model.image.embedder.places.table, theirs.vit.embeddings.position_embeddings[0]),
        (model.heads["masked_patches"].places.table, theirs.decoder.decoder_pos_embed[0]),
    )
    for own, their in waves:
        torch.testing.assert_close(own, their.detach(), rtol=0, atol=1e-7)
        own.copy_(their.detach())  # they are float32, and may be rounded differently
    assert sorted(name for _, piece in found for name in piece.theirs) == sorted(saved)
    return found


def batch_of(pixels):
    layout = vk.SegmentLayout([[0, COUNT]] * PICTURES)
    hidden = [[n for n in range(COUNT) if n not in kept] for kept in KEPT]
    kept, hidden = (Places.of_samples([Places.of_sample(np.asarray(row)) for row in rows]) for rows in (KEPT, hidden))
    images = layout.select((1,))
    patches = Patches(vk.patchify(pixels, images, PATCH), even_grid(PICTURES, (SIDE, SIDE), pixels.device))
    ids = torch.arange(PICTURES, dtype=torch.int32)
    counts = {"pairs": PICTURES, "masked_patches": len(hidden)}
    return Batch(layout, None, patches, ids.long(), ids, views={"masked_patches": KeptPatches(kept, hidden)}, counts=counts)


def test_it_is_maes():
    with InDouble():
        theirs, (ours, objective) = their_model(), our_model()
        pairs = copied(ours, theirs)
        torch.manual_seed(0)
        pixels = torch.randn(PICTURES, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)
        noise = torch.ones(PICTURES, COUNT)
        for row, kept in zip(noise, KEPT, strict=True):
            row[kept] = 0
        expected = theirs(pixels, noise=noise).loss
        loss = objective(ours, batch_of(pixels))[0]["masked_patches"]
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        loss.backward()
        expected.backward()
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        for parameter, piece in pairs:
            torch.testing.assert_close(parameter.grad, piece.read(gradients), rtol=1e-8, atol=1e-10, msg=piece.ours)


def test_a_patch_of_one_colour_is_zero():
    pixels = torch.cat((torch.full((1, 12), 3.0), torch.arange(12.0)[None]))
    found = normalised(pixels)
    assert not found[0].any()
    torch.testing.assert_close(found[1].var(), torch.tensor(1.0), rtol=1e-4, atol=0)
