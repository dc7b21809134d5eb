"""Models that call no registry: after a class swap they equal eager, and their state is untouched."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlkernels as vk
from tests.integrations.comparing import assert_same, attention_calls, cast, floats, gradients
from tests.integrations.tiny_models import IMAGE, TEXT, WIDTH, boxes, ids, left, pixels, redrawn, right, transformers
from vlkernels.testing import error_rule

T = transformers
VIT = dict(WIDTH, image_size=12, patch_size=4)


@dataclass(frozen=True)
class Family:
    name: str
    build: Any
    inputs: Any
    modules: int
    calls: int | None = None  # where some are called more than once

    def __str__(self) -> str:
        return self.name


def _text(mask=right, **more: Any) -> Any:
    return lambda: {"input_ids": ids(), "attention_mask": mask(), **{name: make() for name, make in more.items()}}


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _vilt() -> nn.Module:
    return T.ViltModel(T.ViltConfig(**TEXT, image_size=12, patch_size=4, max_image_length=-1))


def _detectron2_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """LayoutLMv2 asks for detectron2, which it needs for its convolutions alone."""
    from transformers.models.layoutlmv2 import modeling_layoutlmv2 as modeling

    class Backbone(nn.Module):
        def __init__(self, config: Any):
            super().__init__()
            self.cfg = types.SimpleNamespace(MODEL=types.SimpleNamespace(PIXEL_MEAN=[0.0] * 3, PIXEL_STD=[1.0] * 3))
            self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))
            self.register_buffer("pixel_std", torch.ones(3, 1, 1))
            self.convolution = nn.Conv2d(3, config.image_feature_pool_shape[-1], 4, stride=4)
            self.pool = nn.AdaptiveAvgPool2d(config.image_feature_pool_shape[:2])

        def forward(self, images: Any) -> Tensor:
            images = getattr(images, "tensor", images)
            return self.pool(self.convolution(images)).flatten(2).transpose(1, 2).contiguous()

    layers = types.ModuleType("detectron2.layers")
    layers.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    detectron2 = types.ModuleType("detectron2")
    detectron2.layers = layers
    monkeypatch.setattr(modeling, "requires_backends", lambda *a, **k: None)
    monkeypatch.setattr(modeling, "LayoutLMv2VisualBackbone", Backbone)
    monkeypatch.setattr(modeling, "detectron2", detectron2, raising=False)
    monkeypatch.setitem(sys.modules, "detectron2", detectron2)
    monkeypatch.setitem(sys.modules, "detectron2.layers", layers)


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """LayoutLMv2's code takes its scores to float32 by name, whatever the model's dtype."""
    from transformers.models.layoutlmv2 import modeling_layoutlmv2 as modeling

    class Torch(types.ModuleType):
        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def finfo(self, dtype: torch.dtype) -> torch.finfo:
            return torch.finfo(torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "torch", Torch("torch"))
        patch.setattr(Tensor, "float", lambda self: self)
        yield


def _layoutlm(kind: str, **more: Any) -> Any:
    coordinates = dict(coordinate_size=8, shape_size=4, max_2d_position_embeddings=1100)
    bins = dict(max_rel_pos=16, rel_pos_bins=8, max_rel_2d_pos=32, rel_2d_pos_bins=8)
    sizes = dict(TEXT, hidden_size=40, num_attention_heads=5, **coordinates, **bins, **more)
    if kind == "v2":
        return T.LayoutLMv2Model(T.LayoutLMv2Config(**sizes, image_feature_pool_shape=[2, 2, 40]))
    return T.LayoutLMv3Model(T.LayoutLMv3Config(**sizes, input_size=12, patch_size=4, visual_embed=True))


def _lxmert() -> nn.Module:
    layers = dict(l_layers=2, r_layers=1, x_layers=1)
    text = {name: value for name, value in TEXT.items() if name != "num_hidden_layers"}
    return T.LxmertModel(T.LxmertConfig(**text, **layers, visual_feat_dim=20))


def _lxmert_inputs() -> dict[str, Any]:
    seen = torch.ones(3, 6)
    seen[1, 4:] = 0
    return {**_text()(), "visual_feats": draw(3, 6, 20), "visual_pos": draw(3, 6, 4), "visual_attention_mask": seen}


def _visual_bert_inputs() -> dict[str, Any]:
    seen = torch.ones(3, 6)
    seen[1, 4:] = 0
    return {**_text()(), "visual_embeds": draw(3, 6, 20), "visual_attention_mask": seen}


def _blip(cls: Any) -> nn.Module:
    text_config = dict(TEXT, encoder_hidden_size=32, projection_dim=16, bos_token_id=1, sep_token_id=2)
    return cls(T.BlipConfig(text_config=text_config, vision_config=VIT, projection_dim=16, image_text_hidden_size=16))


def _flava() -> nn.Module:
    parts = dict(text_config=dict(TEXT), image_config=dict(IMAGE), multimodal_config=dict(WIDTH))
    return T.FlavaModel(T.FlavaConfig(**parts, projection_dim=16, hidden_size=32))


FAMILIES = [
    Family("vilt", _vilt, _text(pixel_values=pixels, pixel_mask=lambda: torch.ones(3, 12, 12, dtype=torch.long)), 2),
    Family("layoutlmv2", lambda: _layoutlm("v2"), _text(bbox=boxes, image=lambda: pixels(16)), 2),
    Family("layoutlmv2-slow-qkv", lambda: _layoutlm("v2", fast_qkv=False), _text(bbox=boxes, image=lambda: pixels(16)), 2),
    Family("layoutlmv2-no-space", lambda: _layoutlm("v2", has_spatial_attention_bias=False),
           _text(bbox=boxes, image=lambda: pixels(16)), 2),
    Family("layoutlmv3", lambda: _layoutlm("v3"), _text(bbox=boxes, pixel_values=pixels), 2),
    Family("layoutlmv3-no-space", lambda: _layoutlm("v3", has_spatial_attention_bias=False),
           _text(bbox=boxes, pixel_values=pixels), 2),
    Family("layoutlmv3-no-bias", lambda: _layoutlm("v3", has_relative_attention_bias=False),
           _text(left, bbox=boxes, pixel_values=pixels), 2),
    Family("lxmert", _lxmert, _lxmert_inputs, 2 + 1 + 3, calls=2 + 1 + 4),
    Family("visual-bert", lambda: T.VisualBertModel(T.VisualBertConfig(**TEXT, visual_embedding_dim=20)),
           _visual_bert_inputs, 2),
    Family("blip", lambda: _blip(T.BlipModel), _text(pixel_values=pixels, return_loss=lambda: True), 2 + 4, calls=2 + 2),
    Family("blip-matching", lambda: _blip(T.BlipForImageTextRetrieval), _text(pixel_values=pixels), 2 + 4),
    Family("blip-caption", lambda: _blip(T.BlipForConditionalGeneration), _text(pixel_values=pixels, labels=ids), 2 + 4),
    Family("flava", _flava, _text(pixel_values=pixels), 6),
]  # fmt: skip


def run(model: nn.Module, family: Family) -> tuple[dict[str, Tensor], int]:
    torch.manual_seed(4)  # ViLT draws its patches
    inexact = family.name.startswith("layoutlmv2") and model.dtype == torch.float64
    with _in_float64() if inexact else contextlib.nullcontext(), vk.recorded() as served:
        return floats(model(**cast(family.inputs(), model.dtype))), len(attention_calls(served))


def built(family: Family, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    if family.name.startswith("layoutlmv2"):
        _detectron2_stub(monkeypatch)
    return redrawn(family.build())


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_outputs_and_gradients_are_eagers(family, monkeypatch):
    model = built(family, monkeypatch).double()
    keys = list(model.state_dict())
    expected, none = run(model, family)
    expected_gradients = gradients(model, expected)
    report = vk.integrations.transformers.swap_attention(model)
    assert len(report.swapped) == family.modules and report.left == (), str(report)
    actual, calls = run(model, family)
    assert (none, calls) == (0, family.calls or family.modules)
    assert_same(actual, expected)
    assert_same(gradients(model, actual), expected_gradients)
    assert list(model.state_dict()) == keys
    assert vk.integrations.swap.unswap(model) == family.modules
    assert run(model, family)[1] == 0


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_outputs_obey_the_error_rule_in_float32(family, monkeypatch):
    model = built(family, monkeypatch)
    with torch.no_grad():
        eager, _ = run(model, family)
        truth, _ = run(copy.deepcopy(model).double(), family)
        vk.integrations.transformers.swap_attention(model)
        actual, _ = run(model, family)
    for name, value in actual.items():
        error_rule.assert_close(name, value, eager[name], truth[name])


def test_a_text_without_a_picture():
    """No key is real: eager's softmax then goes over all of them."""
    model, inputs, outputs = redrawn(_lxmert()).double(), _lxmert_inputs(), []
    inputs["visual_attention_mask"][2] = 0
    for _ in range(2):
        outputs.append(model(**cast(inputs, torch.float64)).language_output)
        vk.integrations.transformers.swap_attention(model)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)


def test_masks_that_weigh_keys():
    model, mask, outputs = redrawn(_vilt()).double(), torch.tensor([0.0, -1.0, 0.5, torch.finfo(torch.float64).min]), []
    attention, states = model.encoder.layer[0].attention.attention, draw(3, 4, 32).double()
    for _ in range(2):
        outputs.append(attention(states, mask.view(1, 1, 1, 4).expand(3, -1, -1, -1))[0])
        vk.integrations.transformers.swap_attention(model)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)


NO_BIAS = [f for f in FAMILIES if not f.name.startswith("layoutlm") and f.name != "blip-caption"]


@pytest.mark.parametrize("family", NO_BIAS, ids=str)
def test_padding_is_packed_away(family, monkeypatch):
    """The kernel without a bias serves where a mask is no more than padding."""
    model = built(family, monkeypatch)
    vk.integrations.transformers.swap_attention(model)
    with vk.recorded() as served:
        model(**family.inputs())
    assert set(attention_calls(served)) == {"cpp"}, served


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("vilt", "lxmert", "blip", "flava")], ids=str)
def test_asking_for_probabilities_is_refused(family, monkeypatch):
    model = built(family, monkeypatch)
    vk.integrations.transformers.swap_attention(model)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**family.inputs(), output_attentions=True)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("layoutlmv2", "layoutlmv3")], ids=str)
def test_models_that_do_not_pass_the_question_on_return_none(family, monkeypatch):
    model = built(family, monkeypatch)
    vk.integrations.transformers.swap_attention(model)
    assert not model(**family.inputs(), output_attentions=True).attentions


def test_blip_generates_the_same_text():
    model = redrawn(_blip(T.BlipForConditionalGeneration)).double()
    texts = []
    for _ in range(2):
        texts.append(model.generate(pixels().double(), ids(4), max_new_tokens=8, do_sample=False))
        vk.integrations.transformers.swap_attention(model)
    assert torch.equal(*texts)


def test_a_cache_of_both_kinds_keeps_the_pictures_keys():
    decoder = redrawn(_blip(T.BlipForConditionalGeneration)).double().text_decoder
    picture, tokens, steps = draw(3, 10, 32).double(), ids(), []
    for _ in range(2):
        past = T.EncoderDecoderCache(T.DynamicCache(), T.DynamicCache())
        for part in (tokens[:, :4], tokens[:, 4:5]):
            more = {"encoder_hidden_states": picture, "past_key_values": past, "use_cache": True, "is_decoder": True}
            steps.append(decoder(input_ids=part, **more).logits)
        assert past.cross_attention_cache.layers[0].keys.shape[2] == 10
        vk.integrations.transformers.swap_attention(decoder)
    torch.testing.assert_close(steps[2:], steps[:2], rtol=1e-9, atol=1e-9)


def test_dropout_is_for_training_only():
    config = T.VisualBertConfig(**TEXT, visual_embedding_dim=20, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    model = redrawn(T.VisualBertModel(config))
    vk.integrations.transformers.swap_attention(model)
    still = [model(**_visual_bert_inputs())[0] for _ in range(2)]
    moved = [model.train()(**_visual_bert_inputs())[0] for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*moved)


def test_the_report_says_what_was_left_and_why():
    model = nn.ModuleDict({
        "vilt": redrawn(_vilt()),
        "bert": T.BertModel(T.BertConfig(**TEXT)),
        "own": nn.MultiheadAttention(8, 2),
    })
    first = model["vilt"].encoder.layer[0].attention.attention
    first.forward = first.forward
    report = vk.integrations.transformers.swap_attention(model)
    reasons = {left.name: left.reason for left in report.left}
    assert [s.name for s in report.swapped] == ["vilt.encoder.layer.1.attention.attention"]
    assert "its forward was replaced on the instance" in reasons["vilt.encoder.layer.0.attention.attention"]
    assert "it asks the registry" in reasons["bert.encoder.layer.0.attention.self"]
    assert reasons["own"] == "no replacement for it is known"
    assert "1 x ViltSelfAttention -> FusedViltSelfAttention" in str(report)
    again = vk.integrations.transformers.swap_attention(model)
    assert not again.swapped and any(left.reason == "it has its new class already" for left in again.left)


def test_swapped_models_are_copied_and_pickled():
    model = redrawn(_vilt())
    vk.integrations.transformers.swap_attention(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    family = FAMILIES[0]
    expected, _ = run(model, family)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        found, calls = run(other, family)
        assert calls == 2
        torch.testing.assert_close(found, expected)
        assert vk.integrations.swap.unswap(other) == 2


def test_state_dicts_travel_between_swapped_and_plain_models():
    plain, swapped = redrawn(_vilt()), _vilt().eval()
    vk.integrations.transformers.swap_attention(swapped)
    swapped.load_state_dict(plain.state_dict())
    for name, value in run(swapped, FAMILIES[0])[0].items():
        torch.testing.assert_close(value, run(plain, FAMILIES[0])[0][name])
