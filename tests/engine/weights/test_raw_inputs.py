"""Folders as their users meet them: a raw caption and a picture through the tokenizer and the image processor of the folder
give what they give here."""

from pathlib import Path

import numpy as np
import pytest
import torch
import vlkernels as vk
from feature_pyramid import layoutlmv2_without_detectron2
from PIL import Image
from stack_parity import redraw
from torch import Tensor
from torch.nn.functional import normalize

from engine.batch import Patches, Pixels, Text
from engine.build import build_model
from engine.data import ImageTransform, image_transform
from engine.data.tokenization.training import train_tokenizer
from engine.published import Loaded, write
from engine.recipes import table

transformers = pytest.importorskip("transformers")

WORDS = [f"word{number} glyph{number}" for number in range(99)]
CAPTION, SECOND = "Word7 glyph30 word19", "glyph8"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TYPES = ["input_ids", "token_type_ids", "attention_mask"]


def picture(width: int = 61, height: int = 44) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def opened(recipe: str, folder: Path, *more: str, family: str | None = None) -> tuple[Loaded, list[str]]:
    """A tiny model of a recipe, redrawn, and what was told where it was written to the folder."""
    config = table.recipe(recipe, "--tiny=true", "--precision=fp32", *more)
    tokenizer = train_tokenizer(WORDS, "wordpiece", 150, lowercase=True, sentinels=config.tokenizer.sentinels)
    model = redraw(build_model(config, tokenizer.vocab_size)).float().eval()
    run = Loaded(model, tokenizer, image_transform(config) if config.model.reads_pictures is not None else None)
    return run, write(folder, run, family, None)


def text_of(run: Loaded, caption: str = CAPTION) -> Text:
    ids = torch.tensor(run.tokenizer.encode(caption, 64)[0])
    return Text(ids, vk.SegmentLayout([[len(ids)]]))


def patches_of(transform: ImageTransform, image: Image.Image) -> tuple[Patches, vk.SegmentLayout]:
    values, positions = (torch.from_numpy(part) for part in transform(image))
    return Patches(values, positions), vk.SegmentLayout([[len(values)]])


def pixels_of(folder: Path, run: Loaded, image: Image.Image) -> Tensor:
    """By the folder's processor, which gives the same patches as the run's transform."""
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    patches, layout = patches_of(run.transform, image)
    torch.testing.assert_close(vk.patchify(pixels, layout, run.transform.patch), patches.values, rtol=0, atol=1e-5)
    return pixels


@pytest.mark.parametrize("recipe", ["clip_vit_b32", "siglip_b16"])
@torch.no_grad()
def test_features_of_two_towers(recipe, tmp_path):
    run, _ = opened(recipe, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    image = theirs.get_image_features(pixel_values=pixels_of(tmp_path, run, picture())).pooler_output
    own = run.model.features_of_image(run.model.image(*patches_of(run.transform, picture()), None))
    torch.testing.assert_close(normalize(image), own, **CLOSE)
    text = text_of(run)
    if recipe == "siglip_b16":
        ids, _ = run.tokenizer.fill(*run.tokenizer.encode(CAPTION, 64), 64)
        text = Text(torch.tensor(ids), vk.SegmentLayout([[64]]))
    padded = read([CAPTION, "word1 " * 90], padding="max_length", truncation=True, return_tensors="pt")
    assert list(padded) == ["input_ids"] + ["attention_mask"] * (recipe != "siglip_b16")
    found = theirs.get_text_features(**padded).pooler_output[:1]
    torch.testing.assert_close(normalize(found), run.model.features_of_text(run.model.text(text, text.layout, None)), **CLOSE)


@pytest.mark.parametrize("size", [(61, 44), (44, 61), (32, 32), (200, 33), (7, 9)])
def test_clips_square_is_cut_from_whole_pixels(size, tmp_path):
    run, _ = opened("clip_vit_b32", tmp_path)
    assert pixels_of(tmp_path, run, picture(*size)).shape == (1, 3, 32, 32)


@torch.no_grad()
def test_a_pair_of_sentences_has_its_types(tmp_path):
    run, _ = opened("bert_base", tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pair = read(CAPTION, SECOND, return_tensors="pt")
    assert list(pair) == TYPES and read.model_max_length == run.model.options.text.max_positions
    first, second = (torch.tensor(run.tokenizer.encode(one, 64)[0]) for one in (CAPTION, SECOND))
    ids = torch.cat((first, second[1:]))
    layout = vk.SegmentLayout([[len(ids)]])
    types = torch.tensor([0] * len(first) + [1] * (len(second) - 1))
    own = run.model.text(Text(ids, layout, types), layout, None)
    torch.testing.assert_close(theirs(**pair).last_hidden_state[0], own.hidden, **CLOSE)


BORDERS = {"t5_base": ([], ["[SEP]"]), "gpt2": ([], []), "bart_base": (["[CLS]"], ["[SEP]"])}


@pytest.mark.parametrize(("recipe", "borders"), BORDERS.items())
def test_a_text_stands_between_what_training_has_there(recipe, borders, tmp_path):
    """T5's encoder reads an end, GPT-2 blocks of running text."""
    run, _ = opened(recipe, tmp_path)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    before, behind = (read.convert_tokens_to_ids(tokens) for tokens in borders)
    assert read(CAPTION)["input_ids"] == [*before, *run.tokenizer.encode(CAPTION, 64)[0][1:-1].tolist(), *behind]


@torch.no_grad()
def test_blip_matches_and_captions(tmp_path):
    run, _ = opened("blip_base", tmp_path / "blip", family="blip")
    theirs = transformers.BlipForImageTextRetrieval.from_pretrained(tmp_path / "blip").eval()
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "blip")
    pixels, words = pixels_of(tmp_path / "blip", run, picture()), read(CAPTION, return_tensors="pt")
    image = run.model.image(*patches_of(run.transform, picture()), None)
    text = text_of(run)
    fused = run.model.fuse(run.model.text.embed(text, text.layout, None), run.model.source_of(image))
    logits = theirs(pixel_values=pixels, **words).itm_score
    torch.testing.assert_close(logits, run.model.heads["matching"](fused.hidden, fused.layout), **CLOSE)
    write(tmp_path / "writer", run, "blip_captions", None)
    writer = transformers.BlipForConditionalGeneration.from_pretrained(tmp_path / "writer").eval()
    written = writer.generate(pixel_values=pixels, max_new_tokens=3, num_beams=1, do_sample=False)
    assert written[0, 0] == run.tokenizer.sentinel_ids[0]


@torch.no_grad()
def test_a_page_with_words_and_boxes(monkeypatch, tmp_path):
    public = layoutlmv2_without_detectron2(monkeypatch)
    run, _ = opened("layoutlmv2_base", tmp_path)
    theirs = public.LayoutLMv2Model.from_pretrained(tmp_path).eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    words, boxes = ["Glyph30", "word7", "Ünknown", "glyph8"], [[10 * n, 20 * n, 10 * n + 90, 20 * n + 15] for n in range(4)]
    page = processor(picture(), words, boxes=boxes, return_tensors="pt")
    pixels = torch.from_numpy(run.transform.pixels(picture()))[None]
    mean, std = (torch.tensor(values)[:, None, None] for values in (run.transform.mean, run.transform.std))
    torch.testing.assert_close(page["image"].flip(1).float() / 255, pixels * std + mean, rtol=0, atol=1e-5)
    found = theirs(**page)
    ids, places = run.tokenizer.encode_words(words, 64)
    own_boxes = torch.tensor([[0] * 4, *(boxes[place] for place in places[1:-1]), [1000] * 4], dtype=torch.int32)
    layout, joint = vk.SegmentLayout([[len(ids)]]), run.model.joint
    text = Text(torch.tensor(ids), layout, torch.zeros(len(ids), dtype=torch.long), own_boxes)
    images = vk.SegmentLayout([[49]])
    grid = torch.from_numpy(np.indices((7, 7), dtype=np.int32).reshape(2, -1).T.copy())
    tokens = joint(text, Pixels(pixels, grid), joint.layout_of(layout, layout, images), None, image_layout=images)
    torch.testing.assert_close(found.pooler_output, joint.pooled(tokens), **CLOSE)


def test_pictures_of_any_aspect_are_said_to_differ(tmp_path):
    """ViLT interpolates its table for every picture."""
    run, lines = opened("vilt_b32", tmp_path)
    assert any("interpolated for every picture" in line for line in lines)
    image = picture(40, 32)
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")
    patches, layout = patches_of(run.transform, image)
    assert torch.allclose(vk.patchify(found["pixel_values"], layout, 8), patches.values, atol=1e-5)


@pytest.mark.parametrize(("recipe", "resize"), [("vilt_b32", "squash"), ("vit_b16", "fit")])
def test_a_way_to_resize_that_a_class_has_not_is_told(recipe, resize, tmp_path):
    _, lines = opened(recipe, tmp_path, f"--data.resize={resize}")
    assert any(f"does not resize by data.resize {resize}" in line for line in lines)
    assert not (tmp_path / "preprocessor_config.json").exists()
