"""BLIP's three modes against `transformers`: every parameter redrawn, ragged texts, outputs and gradients in float64."""

import numpy as np
import pytest
import torch
from stack_parity import LENGTHS, InDouble, compare, copy_weights, redraw, visible
from torch.nn import functional as F

from engine.batch import Patches, Sample, Words
from engine.build import build_model
from engine.data import collate
from engine.models import VisionLanguageModel
from engine.objectives import add_heads
from engine.objectives.causal_language import CausalLanguage
from engine.objectives.matching import Matching, logits_of_pairs, matching_logits
from engine.objectives.parts.gallery import encode_gallery
from engine.recipes import table
from engine.sections import DecoderStack, FusionStack, ImageStack, Model, TextStack
from engine.weights import blip

transformers = pytest.importorskip("transformers")

VOCAB, LAYERS, PATCH, SIDE, FEATURES = 50, 2, 4, 3, 12
DEC, ENC = VOCAB - 2, VOCAB - 1
SIZES = {"width": 24, "layers": LAYERS, "heads": 3, "mlp_width": 40, "eps": 1e-6, "activation": "gelu"}
THEIRS = {
    "hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "intermediate_size": 40, "layer_norm_eps": 1e-6,
}  # fmt: skip
IMAGE = ImageStack(
    **SIZES, patch_size=PATCH, max_grid=(SIDE, SIDE), positions="learned", class_token=True, embedding_norm=False,
    pooling="first", projection="affine",
)  # fmt: skip
WORDS = {**SIZES, "norm": "post", "max_positions": 16}


def theirs(kind: str) -> torch.nn.Module:
    text = {**THEIRS, "encoder_hidden_size": 24, "vocab_size": VOCAB, "max_position_embeddings": 16, "label_smoothing": 0.1}
    picture = {**THEIRS, "patch_size": PATCH, "image_size": PATCH * SIDE}
    config = transformers.BlipConfig(text_config=text, vision_config=picture, image_text_hidden_size=FEATURES)
    config._attn_implementation = "eager"
    return redraw(getattr(transformers, kind)(config)).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, and ids that begin with 1."""
    torch.manual_seed(2)
    ids = torch.randint(2, DEC, (len(LENGTHS), max(LENGTHS))) * visible()
    ids[:, 0] = 1
    return torch.randn(len(LENGTHS), 3, PATCH * SIDE, PATCH * SIDE, dtype=torch.float64), ids


def batch_of(pixels, ids, objective=None):
    """With an objective, of the texts that it can be about."""
    samples = []
    positions = torch.from_numpy(np.indices((SIDE, SIDE), dtype=np.int32).reshape(2, -1).T.copy())
    for number, length in enumerate(LENGTHS):
        patches = F.unfold(pixels[number : number + 1], PATCH, stride=PATCH)[0].T
        sample = Sample(Words(ids[number, :length].numpy(), np.arange(length)), Patches(patches, positions), identity=number)
        if objective is not None and length > 1:
            objective.prepare(sample, None)
        if objective is None or sample.views:
            samples.append(sample)
    return collate(samples, range(len(samples)))


def begun_with(ids, token):
    return torch.cat((torch.full_like(ids[:, :1], token), ids[:, 1:]), 1)


def retriever() -> VisionLanguageModel:
    fusion = FusionStack(**{**SIZES, "norm": "post"}, begins_with="ids", first_token=-1)
    text = TextStack(**WORDS, pooling="first", projection="affine")
    model = VisionLanguageModel(Model(image=IMAGE, text=text, fusion=fusion, projection_dim=FEATURES), VOCAB)
    add_heads(model, {"matching": Matching()})
    return model.double()


def test_text_encoder_and_image_grounded_encoder():
    """Similarities of the towers, with [CLS]; matching logits, with [ENC]."""
    model = retriever()
    del model.logit_scale  # theirs has none
    public = theirs("BlipForImageTextRetrieval")
    pieces = copy_weights(model, public, blip.retrieval(LAYERS, LAYERS))
    pixels, ids = inputs()
    seen = {"pixel_values": pixels, "attention_mask": visible().long()}
    with InDouble():
        similarity = public(begun_with(ids, 1), use_itm_head=False, **seen).itm_score
        matching = public(begun_with(ids, ENC), **seen).itm_score
    batch = batch_of(pixels, ids)
    ours = model.image_features(batch) @ model.text_features(batch).T, matching_logits(model, model.fused_states(batch))
    compare(model, public, pieces, torch.cat([one.flatten() for one in ours]), torch.cat((similarity.flatten(), matching.flatten())))


def test_decoder():
    """The loss of every next word with smoothed labels, begun with [DEC]."""
    objective = CausalLanguage(output="transform", label_smoothing=0.1)
    decoder = DecoderStack(**WORDS, source="image", first_token=-2)
    model = VisionLanguageModel(Model(image=IMAGE, text=None, fusion=None, decoder=decoder), VOCAB)
    add_heads(model, {"causal_language": objective})
    model.double()
    public = theirs("BlipForConditionalGeneration")
    pieces = copy_weights(model, public, blip.captioning(LAYERS, LAYERS))
    pixels, ids = inputs()
    written, seen = torch.tensor(LENGTHS) > 1, visible()  # behind a single token there is nothing to say
    labels = ids.masked_fill(~seen, -100)[written]
    with InDouble():
        loss = public(pixels[written], begun_with(ids, DEC)[written], attention_mask=seen[written].long(), labels=labels).loss
    ours = objective(model, batch_of(pixels, ids, objective))[0]["causal_language"]
    compare(model, public, pieces, ours, loss)


@torch.no_grad()
def test_pairs_of_a_gallery_are_read_as_in_training():
    """From their ids on, not from the text tower's states."""
    model, batch = redraw(retriever()), batch_of(*inputs())
    own = torch.arange(len(LENGTHS))
    found = logits_of_pairs(model, encode_gallery(model, [batch]), own, own)
    torch.testing.assert_close(found, matching_logits(model, model.fused_states(batch)).float())


def test_one_text_in_three_modes():
    model = build_model(table.recipe("blip_base", "--tiny=true"), VOCAB)
    text, fusion, decoder = (role.transformer.blocks for role in (model.text, model.fusion, model.decoder))
    assert model.decoder.embedder is model.text.embedder
    for encodes, grounded, writes in zip(text, fusion, decoder, strict=True):
        assert grounded.self_attention is encodes.self_attention is not writes.self_attention
        assert grounded.feed_forward is encodes.feed_forward is writes.feed_forward
        assert grounded.cross_attention is writes.cross_attention
