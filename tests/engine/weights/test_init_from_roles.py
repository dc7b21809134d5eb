"""Runs that begin role by role: each reads as the public model whose weights it took, or a part of one."""

import pytest
import torch
import vlkernels as vk
from stack_parity import LENGTHS, InDouble, layout_of, redraw, visible

from engine.batch import Patches, Text
from engine.build import build_model
from engine.config import Config
from engine.initial_weights import load_initial_weights
from engine.models import VisionLanguageModel
from engine.models.embedding.places import even_grid
from engine.recipes import table

transformers = pytest.importorskip("transformers")

VOCAB, PATCH = 50, 4
SIZES = {"width": 24, "layers": 2, "heads": 3, "mlp_width": 40}
THEIRS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def saved(folder, kind: str, **options):
    """A public model with every parameter redrawn in what float32 holds, saved to the folder."""
    model_class = getattr(transformers, kind)
    theirs = redraw(model_class(model_class.config_class(**THEIRS | options))).float().eval()
    theirs.save_pretrained(folder)
    return theirs


def begun(name: str, folders: dict, *more: str, roles=("image", "text", "fusion")) -> tuple[VisionLanguageModel, list[str]]:
    """A recipe with few layers that begins with the folders, in float64, and what was told."""
    sizes = [f"--model.{role}.{key}={value}" for role in roles for key, value in SIZES.items()]
    config: Config = table.recipe(name, *sizes, *more)
    config.init_from = {role: str(folder) for role, folder in folders.items()}
    model = build_model(config, VOCAB)
    lines = load_initial_weights(config, model)
    return model.double().eval(), lines


def pictures(side: int) -> tuple[torch.Tensor, Patches, vk.SegmentLayout]:
    pixels = torch.randn(2, 3, side * PATCH, side * PATCH, dtype=torch.float64)
    layout = vk.SegmentLayout([[side * side]] * 2)
    return pixels, Patches(vk.patchify(pixels, layout, PATCH), even_grid(2, (side, side), pixels.device)), layout


def albef(tmp_path, side: int) -> tuple[VisionLanguageModel, list[str], torch.nn.Module, torch.nn.Module]:
    vit = saved(tmp_path / "vit", "ViTModel", image_size=3 * PATCH, patch_size=PATCH, layer_norm_eps=1e-6)
    bert = saved(tmp_path / "bert", "BertForMaskedLM", num_hidden_layers=4, vocab_size=VOCAB)
    folders = {"image": tmp_path / "vit", "text": tmp_path / "bert", "fusion": tmp_path / "bert"}
    size = f"--data.image_size={side * PATCH}", f"--model.image.max_grid=[{side},{side}]", f"--model.image.patch_size={PATCH}"
    return *begun("albef_base", folders, *size), vit, bert


@torch.no_grad()
def test_albef_begins_as_a_vit_and_a_bert_cut_in_two(tmp_path):
    model, lines, vit, bert = albef(tmp_path, 3)
    pixels, image, layout = pictures(3)
    ids = torch.randint(1, VOCAB, (len(LENGTHS), max(LENGTHS)))
    text = Text(ids[visible()], layout_of())
    for block in model.fusion.transformer.blocks:  # BERT has nothing for what reads the picture: here it adds nothing
        block.cross_attention.output.weight.zero_(), block.cross_attention.output.bias.zero_()
    with InDouble():
        states = vit.double()(pixels).last_hidden_state
        read = bert.double().bert(ids, visible().long(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.image(image, layout, None).hidden, states.flatten(0, 1), **CLOSE)
        halfway = model.text(text, text.layout, None)
        torch.testing.assert_close(halfway.hidden, read[2][visible()], **CLOSE)
        first, second = (block.feed_forward for block in model.fusion.transformer.blocks)
        assert torch.equal(first.inner.weight, bert.bert.encoder.layer[2].intermediate.dense.weight)
        assert torch.equal(second.norm.bias, bert.bert.encoder.layer[3].output.LayerNorm.bias)
        head = model.heads["masked_language"]
        torch.testing.assert_close(head.logits(read[4], model.words), bert.cls.predictions(read[4]), **CLOSE)
    left = lines[-1].removeprefix("left at their initialisation: ").split(", ")
    assert all(".cross_attention." in name or not name.startswith(("image.", "text.", "fusion.")) for name in left)
    assert sum(".cross_attention." in name for name in left) == 2 * 8
    told = [line for line in lines if line.startswith("not used")]
    assert "bert.encoder.layer.2." in told[1] and "bert.encoder.layer.1." not in told[1]
    assert "bert.encoder.layer.1." in told[2] and "bert.encoder.layer.2." not in told[2]


@torch.no_grad()
def test_another_grid_is_interpolated_as_in_vit(tmp_path):
    model, lines, vit, _ = albef(tmp_path, 5)
    pixels, image, layout = pictures(5)
    assert "of tables of another size: image.embedder.places.table interpolated from 3 x 3 to 5 x 5 places" in lines
    with InDouble():
        states = vit.double()(pixels, interpolate_pos_encoding=True).last_hidden_state
        found = model.image(image, layout, None).hidden
    torch.testing.assert_close(found, states.flatten(0, 1), rtol=1e-5, atol=1e-5)  # interpolated in float32 here
    assert torch.equal(model.image.embedder.places.table[:1].float(), vit.embeddings.position_embeddings[0, :1].float())


def test_the_copy_that_follows_begins_with_the_same(tmp_path):
    model, *_ = albef(tmp_path, 3)
    model.teacher.begin()
    assert torch.equal(model.teacher.module.image.embedder.class_token, model.image.embedder.class_token)


@pytest.mark.parametrize(
    ("role", "folder", "more", "told"),
    [
        ("text", "vit", [], "is a vit, with weights for image, joint; it has none for text"),
        ("decoder", "bert", [], "the part must be one of model, image, text, fusion, got decoder"),
        ("fusion", "bert", ["--model.text.layers=3"], "does not fit: model.fusion.layers must be 1, got 2"),
        ("text", "bert", ["--model.text.layers=5"], "does not fit: model.text.layers must be 4, got 5"),
        ("image", "vit", ["--model.image.eps=1e-5"], "does not fit: model.image.eps must be 1e-06, got 1e-05"),
        (
            "image",
            "vit",
            ["--model.image.embedding_norm=true", "--model.image.layers=3"],
            "does not fit: model.image.layers must be 2, got 3; model.image.picture.embedding_norm must be False, got True",
        ),
    ],
)
def test_what_does_not_fit_a_role(tmp_path, role, folder, more, told):
    saved(tmp_path / "vit", "ViTModel", image_size=3 * PATCH, patch_size=PATCH, layer_norm_eps=1e-6)
    saved(tmp_path / "bert", "BertForMaskedLM", num_hidden_layers=4, vocab_size=VOCAB)
    size = [f"--data.image_size={3 * PATCH}", "--model.image.max_grid=[3,3]", f"--model.image.patch_size={PATCH}"]
    with pytest.raises(ValueError) as caught:
        begun("albef_base", {role: tmp_path / folder}, *size, *more)
    assert str(caught.value).endswith(told)
