"""Passes are shared, dropout belongs to the pair, shapes that do not fit are refused."""

import math

import pytest
import torch
from random_batch import THREE, VOCAB, random_batch, random_sample, small_config, small_model

from engine.data import collate
from engine.models import VisionLanguageModel
from engine.objectives import Objectives, PretrainingModule


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_every_pass_runs_once():
    model = small_model()
    image, text = count_calls(model.image.transformer), count_calls(model.text.transformer)
    keys_values = count_calls(model.fusion.transformer.blocks[0].cross_attention.key_value)
    fusion = count_calls(model.fusion)
    module = PretrainingModule(model, THREE.active)
    module(random_batch(range(6)))
    assert (len(image), len(text), len(keys_values), len(fusion)) == (1, 2, 1, 2)
    module(random_batch(range(6)))
    assert len(image) == 2, "another batch is another pass"
    model.image_states(random_batch(range(6)))
    assert len(image) == 3 and model._passes is None, "nothing is kept outside a forward"


def test_dropout_belongs_to_the_pair():
    """The same pair in another place of another batch draws the same masks; another step draws others."""
    model = small_model(dropout=0.3)
    first, second = random_batch(range(6)), collate([random_sample(i) for i in (4, 2)], (4, 2))
    for encode in (model.image_features, model.text_features):
        here, there = encode(first), encode(second)
        torch.testing.assert_close(here[[4, 2]], there, rtol=1e-5, atol=1e-6)
        model.eval()
        assert (encode(first) - here).abs().max() > 1e-2
        model.train()
        model.rng.advance()
        assert (encode(first) - here).abs().max() > 1e-2


def test_variants_of_a_pair_draw_different_masks():
    model = small_model(dropout=0.3)
    batch = random_batch(range(4))
    batch.views["masked_language"].ids = batch.text.ids
    plain, masked = model.text_states(batch).hidden, model.text_states(batch, "masked_language").hidden
    assert (plain - masked).abs().max() > 1e-2
    model.eval()
    torch.testing.assert_close(model.text_states(batch).hidden, model.text_states(batch, "masked_language").hidden)


def test_sources_may_be_read_by_any_text():
    """`index` chooses the image; the states of images are projected once and not copied."""
    model, batch = small_model(), random_batch(range(5))
    index = torch.tensor([3, 3, 0, 1, 4], dtype=torch.int32)
    image, text = model.image_states(batch), model.text_states(batch)
    fused = model.fuse(text, model.source_of(image, index)).hidden
    copied = model.fuse(text, model.source_of(image.take(index))).hidden
    torch.testing.assert_close(fused, copied)
    assert (fused - model.fuse(text, model.source_of(image)).hidden).abs().max() > 1e-2


def test_cross_attention_every_second_block():
    config = small_config(cross_every=2)
    model = VisionLanguageModel(config, VOCAB)
    assert [block.cross_attention is not None for block in model.fusion.transformer.blocks] == [True, False]
    batch = random_batch(range(3))
    assert model.fuse(model.text_states(batch), model.image_source(batch)).hidden.shape[1] == 32


def test_checkpointing_changes_no_bit():
    gradients = []
    for recompute in (False, True):
        model = small_model(dropout=0.2)
        model.checkpoint_activations(recompute)
        PretrainingModule(model, THREE.active)(random_batch(range(6)))[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_rng_moves_with_the_model():
    model = small_model().to("meta")
    assert model.rng.state.device.type == "meta"


@pytest.mark.parametrize("at, scale", [(9.0, 100.0), (-9.0, 2.0), (math.log(7.0), 7.0)])
@pytest.mark.parametrize("gradient", [1.0, -1.0])
def test_scale_is_limited_and_finds_its_way_back(at, scale, gradient):
    """A step goes against the gradient: past a limit only one that leads back arrives."""
    model = small_model()
    model.options.logit_scale_min, model.options.logit_scale_max = 2.0, 100.0
    with torch.no_grad():
        model.logit_scale.fill_(at)
    found = model.scale()
    torch.testing.assert_close(found, torch.tensor([scale]))
    (gradient * found).sum().backward()
    arrives = scale == 7.0 or (at > 0) == (gradient > 0)
    torch.testing.assert_close(model.logit_scale.grad, torch.tensor([gradient * scale * arrives]))
