"""LayoutLMv2 and LayoutXLM become runs and runs become such folders, with their backbones. Those have detectron2's names as its
source tells them: `feature_pyramid` stands in the place of the library."""

import pytest
import torch
import vlkernels as vk
from feature_pyramid import DEPTHS, FeaturePyramid, Shape, layoutlmv2_without_detectron2, redraw_norms
from stack_parity import LENGTHS, InDouble, layout_of, redraw, visible

from engine.batch import Pixels, Text
from engine.build import build_model
from engine.config import Config
from engine.data import image_transform
from engine.data.tokenization.training import train_tokenizer
from engine.initial_weights import load_initial_weights
from engine.models.embedding.places import even_grid
from engine.models.embedding.resnet import BACKBONES, Bottleneck, FinestPyramidLevel, ResNet
from engine.published import Loaded, write
from engine.recipes import table
from engine.weights.pyramid import pyramid

transformers = pytest.importorskip("transformers")

TOKENIZER = train_tokenizer([f"word{number} glyph{number}" for number in range(99)], "wordpiece", 120, False)
VOCAB, POSITIONS, SIDE, GRID = TOKENIZER.vocab_size, 60, 64, (7, 7)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SIZES = {"width": 24, "layers": 2, "heads": 3, "mlp_width": 40, "max_positions": POSITIONS, "image.backbone": "resnet18_fpn"}
DISTANCES = {"relative_position.count": 8, "relative_position.max_distance": 20}
DISTANCES |= {"relative_box.count": 16, "relative_box.max_distance": 100}
THEIRS = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "coordinate_size": 4,
    "shape_size": 4,
    "image_feature_pool_shape": [*GRID, 256],
    "detectron2_config_args": {
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.NUM_GROUPS": 1,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    },
}
SYSTEMS = {
    "layoutlmv2_base": (
        {"rel_pos_bins": 8, "max_rel_pos": 20, "rel_2d_pos_bins": 16, "max_rel_2d_pos": 100},
        DISTANCES,
    ),
    "layoutxlm_base": (
        {"fast_qkv": False, "has_relative_attention_bias": False, "has_spatial_attention_bias": False}
        | {"has_visual_segment_embedding": True, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        {"biases": "all", "relative_position": "null", "relative_box": "null"},
    ),
}
"""What differs from the defaults of `transformers`, and what from the recipe: the LayoutXLM that was released."""
COARSER = {f"layoutlmv2.visual.backbone.fpn_output{level}.{kind}" for level in (3, 4, 5) for kind in ("weight", "bias")}
"""Outputs of levels that LayoutLMv2 does not read."""


@pytest.fixture
def public(monkeypatch):
    return layoutlmv2_without_detectron2(monkeypatch)


def begun(recipe: str, folder, more: dict, *others: str) -> tuple[Config, torch.nn.Module, list[str]]:
    options = {f"model.joint.{name}": value for name, value in (SIZES | more).items()}
    options |= {"data.max_caption_tokens": POSITIONS, "data.image_size": SIDE}
    config = table.recipe(recipe, *(f"--{name}={value}" for name, value in options.items()), *others)
    config.init_from = {"joint": str(folder)}
    model = build_model(config, VOCAB)
    return config, model, load_initial_weights(config, model)


def states_of_both(model: torch.nn.Module, theirs: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Words, and what stands for the pages, of pictures in bytes."""
    mean, std = theirs.visual.pixel_mean.flip(0), theirs.visual.pixel_std.flip(0)  # in float32, in which they are kept
    pages = torch.randint(256, (len(LENGTHS), 3, SIDE, SIDE)).double()
    ids = torch.randint(5, VOCAB, (len(LENGTHS), max(LENGTHS))) * visible()
    boxes = torch.randint(500, (*ids.shape, 4)) + torch.tensor([0, 0, 500, 500])
    with InDouble():
        read = theirs.double().eval()(ids, boxes, pages.flip(1), attention_mask=visible().long())
        expected = torch.cat((read.last_hidden_state[:, : max(LENGTHS)][visible()], read.pooler_output))
        joint, images = model.double().eval().joint, vk.SegmentLayout([[GRID[0] * GRID[1]]] * len(ids))
        cells = Pixels((pages - mean.double()) / std.double(), even_grid(len(ids), GRID, pages.device))
        layout = joint.layout_of(layout_of(), layout_of(), images)
        words = Text(ids[visible()], layout_of(), torch.zeros_like(ids[visible()]), boxes[visible()].int())
        tokens = joint(words, cells, layout, None, image_layout=images)
        states = vk.take_segments(tokens.hidden, tokens.layout, (0,))
        return torch.cat((states, joint.pooled(tokens))), expected


@pytest.mark.parametrize("recipe", SYSTEMS)
@torch.no_grad()
def test_there_and_back_with_the_backbone(recipe, public, tmp_path):
    more, options = SYSTEMS[recipe]
    theirs = redraw(public.LayoutLMv2Model(transformers.LayoutLMv2Config(**THEIRS | more)))
    redraw_norms(theirs.visual.backbone)
    theirs.float().save_pretrained(tmp_path / "theirs")
    config, model, lines = begun(recipe, tmp_path / "theirs", options)
    told = [line for line in lines if line.startswith("not used")]
    assert set(told[0].partition(": ")[2].split(", ")) == COARSER and len(lines) == 3
    assert all(name.startswith("heads.") for name in lines[-1].partition(": ")[2].split(", "))

    first, left = write(tmp_path / "ours", Loaded(model, TOKENIZER, image_transform(config)), None, None)
    assert first.endswith("a LayoutLMv2Model")
    assert all(name.startswith("heads.") for name in left.partition(": ")[2].split(", "))
    again, told = public.LayoutLMv2Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert {f"layoutlmv2.{name}" for name in told["missing_keys"]} == COARSER
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    saved, found = theirs.state_dict(), again.state_dict()
    for name in saved.keys() - {name.removeprefix("layoutlmv2.") for name in COARSER}:
        assert torch.equal(found[name], saved[name]), name
    written = again.config.to_dict()
    for name, value in (THEIRS | more | {"detectron2_config_args": written["detectron2_config_args"]}).items():
        assert written[name] == value, name
    for name, own in (("mean", config.data.image_mean), ("std", config.data.image_std)):
        torch.testing.assert_close(getattr(again.visual, f"pixel_{name}").flatten().flip(0), 255 * torch.tensor(own))
    torch.testing.assert_close(*states_of_both(model, again), **CLOSE)


def test_a_tagger_opens_it_too(public, tmp_path):
    config = table.recipe("layoutlmv2_base", "--tiny=true", "--precision=fp32")
    write(tmp_path, Loaded(build_model(config, VOCAB), TOKENIZER, image_transform(config)), None, None)
    _, told = public.LayoutLMv2ForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["missing_keys"]) == COARSER | {"classifier.weight", "classifier.bias"} and not told["unexpected_keys"]


@torch.no_grad()
def test_grouped_bottlenecks_compute_the_same():
    """With fewer stages than a ResNeXt-101 has."""
    theirs = redraw_norms(FeaturePyramid(Shape((1, 2), 256, 32, 8)).double())
    ours = FinestPyramidLevel(ResNet(Bottleneck, (1, 2), groups=32, group_width=8)).double()
    saved, own = theirs.state_dict(), ours.state_dict()
    for piece in pyramid(own):
        own[piece.ours].copy_(piece.read(saved))
        for name, tensor in piece.write(own[piece.ours]).items():
            assert torch.equal(tensor, saved[name]), name
    picture = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(picture), theirs(picture.flip(1))["p2"], **CLOSE)


def test_the_published_backbone_has_these_names_and_shapes():
    with torch.device("meta"):
        theirs = FeaturePyramid(Shape(DEPTHS[101], 256, 32, 8)).state_dict()
        ours = BACKBONES["resnext101_fpn"]().state_dict()
    found = {piece.theirs[0]: tuple(ours[piece.ours].shape) for piece in pyramid(ours)}
    assert found == {name: tuple(one.shape) for name, one in theirs.items() if f"layoutlmv2.visual.backbone.{name}" not in COARSER}
    assert found["bottom_up.res4.22.conv2.norm.running_var"] == (1024,) and found["fpn_lateral5.weight"] == (256, 2048, 1, 1)


@pytest.mark.parametrize(
    ("told", "more", "others", "line"),
    [
        ({"detectron2_config_args": None}, DISTANCES, [], "model.joint.image.backbone's depth must be 101, got 18; "),
        ({"rel_pos_bins": 9}, DISTANCES, [], "model.joint.relative_position.count must be 9, got 8"),
        ({"fast_qkv": False}, DISTANCES, [], "model.joint.biases must be all, got no_key"),
        ({}, DISTANCES | {"image.backbone": "resnet18", "image.backbone_norm": "frozen"}, [], "depth must be 18, got None"),
    ],
)
def test_what_does_not_fit(told, more, others, line, public, tmp_path):
    settings = THEIRS | SYSTEMS["layoutlmv2_base"][0] | told
    public.LayoutLMv2Model(transformers.LayoutLMv2Config(**THEIRS | SYSTEMS["layoutlmv2_base"][0])).save_pretrained(tmp_path)
    transformers.LayoutLMv2Config(**settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"does not fit: .*{line}"):
        begun("layoutlmv2_base", tmp_path, more, *others)


def test_pictures_of_another_normalisation_are_told(public, tmp_path):
    theirs = public.LayoutLMv2Model(transformers.LayoutLMv2Config(**THEIRS | SYSTEMS["layoutlmv2_base"][0]))
    theirs.save_pretrained(tmp_path)
    _, _, lines = begun("layoutlmv2_base", tmp_path, DISTANCES, "--data.image_mean=[0.5,0.456,0.406]")
    assert "the run keeps its own: data.image_mean is [0.5, 0.456, 0.406] (the folder: [0.485, 0.456, 0.406])" in lines
