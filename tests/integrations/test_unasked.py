"""Models whose attention asks no registry would add the masks to their scores as numbers: they are refused by name."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

import vlkernels as vk
from tests.integrations import test_masks as masks
from tests.integrations.tiny_models import IMAGE, LLAMA, TEXT, ids, left, redrawn, right, transformers


@pytest.fixture(autouse=True, scope="module")
def registered():
    vk.integrations.transformers.register()


GIT = dict(TEXT, vision_config=dict(IMAGE))
SPARSE = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=37, decoder_ffn_dim=37, vocab_size=99)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("MegatronBertModel", TEXT),
        ("VisualBertModel", TEXT),
        ("LayoutLMv3Model", dict(TEXT, coordinate_size=5, shape_size=6, image_size=12, patch_size=4, input_size=12)),
        ("FlavaTextModel", TEXT),
        ("BlipTextModel", TEXT),
        ("BloomForCausalLM", dict(vocab_size=99, hidden_size=32, n_layer=1, n_head=4)),
        ("GitForCausalLM", GIT),
        ("BigBirdPegasusModel", SPARSE),
    ],
)
def test_models_that_ask_no_registry_are_refused(name, settings):
    kind = getattr(transformers, name)
    config = kind.config_class(**settings)
    if name == "GitForCausalLM":  # it is asked for its images
        model = kind(config)
        model.set_attn_implementation("vlkernels")
    else:
        model = kind._from_config(config, attn_implementation="vlkernels")
    with pytest.raises(ValueError, match=f'the attention of {kind.config_class.__name__} asks no registry.*use "eager"'):
        model(input_ids=ids(), attention_mask=right())


def test_models_whose_attention_is_another_models_are_served():
    config = transformers.PaliGemmaConfig(
        vision_config=dict(IMAGE, model_type="siglip_vision_model", projection_dim=32), projection_dim=32, image_token_index=98,
        text_config=dict(LLAMA, model_type="gemma", head_dim=8),
    )  # fmt: skip
    model = redrawn(transformers.PaliGemmaForConditionalGeneration(config)).double()
    inputs = {"attention_mask": left(), "token_type_ids": torch.zeros(3, 11, dtype=torch.long)}
    masks.same_as_sdpa(model, left(), input_ids=ids(), **inputs)


def test_a_model_of_ones_own_may_ask_as_it_likes(monkeypatch):
    own = types.ModuleType("modeling_own")
    own.OwnAttention = type("OwnAttention", (nn.Module,), {"__module__": "modeling_own"})
    monkeypatch.setitem(sys.modules, "modeling_own", own)
    config = type("OwnConfig", (transformers.LlamaConfig,), {"__module__": "configuration_own"})(**LLAMA)
    assert masks.mask_of(config).shape == (3, 11)
    for module in ("transformers.models.own", "transformers_modules.own"):
        monkeypatch.setitem(sys.modules, f"{module}.modeling_own", own)
        own.__name__ = own.OwnAttention.__module__ = f"{module}.modeling_own"
        type(config).__module__ = f"{module}.configuration_own"
        with pytest.raises(ValueError, match="the attention of OwnConfig asks no registry"):
            masks.mask_of(config)
