"""Evaluation of whole models: one that knows the answers, one that does not, and the files it writes."""

import json
import math

import numpy as np
import pytest
import torch
import vlkernels as vk
from PIL import Image
from random_batch import THREE, GRID, PATCH, random_batch, small_config, small_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Model
from tokenizers import models, pre_tokenizers

import engine
from engine.batch import Batch, Patches, Pixels
from engine.build import build_model
from engine.config import Config
from engine.data import Tokenizer
from engine.evaluation import describe, evaluate
from engine.evaluation.sheet import pixels_of
from engine.export import export, rebuild
from engine.objectives import PretrainingModule
from engine.objectives.matching import logits_of_pairs, matching_logits, told_apart
from engine.objectives.parts.gallery import encode_gallery
from engine.sections import Data, Evaluation, Train

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"w{n}" for n in range(33)), "red", "blue"]


def make_tokenizer() -> Tokenizer:
    model = Model(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(model)


def make_config(**evaluation) -> Config:
    return Config(
        data=Data(
            image_size=PATCH * min(GRID), max_caption_tokens=16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
        ),
        model=small_config(),
        objectives=THREE,
        train=Train(max_steps=1),
        evaluation=Evaluation(**{"rerank_top": 6, "batch": 8, **evaluation}),
    )


def batches(count: int = 24) -> list:
    return [random_batch(range(first, min(first + 8, count))) for first in range(0, count, 8)]


def read(pairs: int, task: str | None) -> list:
    assert pairs == 8 and task in (None, "masked_language")
    return batches()


def test_an_untrained_model_is_at_chance(tmp_path):
    model = small_model()
    results = evaluate(
        model, read, make_config(), tokenizer=make_tokenizer(), sheet=tmp_path / "sheet.png"
    )
    assert results["pairs"] == 24
    assert results["contrastive"]["chance_recall@1"] == pytest.approx(1 / 24, rel=0.2)
    assert results["contrastive"]["text_to_image_recall@1"] < 0.3
    assert results["matching"]["accuracy"] == pytest.approx(0.5, abs=0.2)
    assert results["masked_language"]["accuracy_chance"] == 1 / len(WORDS)
    assert model.training
    json.dumps(results)
    text = describe(results)
    assert (
        all(group in text for group in ("contrastive", "reranked", "matching", "masked_language"))
        and "(even odds 50 %)" in text
    )
    assert Image.open(tmp_path / "sheet.png").size[0] > 500


def test_the_sheet_shows_patches_and_pixels_alike():
    pixels, layout = torch.rand(2, 3, 2 * PATCH, 3 * PATCH), vk.SegmentLayout([[0, 6]] * 2)
    places = torch.cartesian_prod(torch.arange(2), torch.arange(3)).repeat(2, 1).int()
    own = layout.select((1,))
    images = Pixels(pixels, places), Patches(vk.patchify(pixels, own, PATCH), places)
    whole = [Batch(layout, None, image, torch.arange(2), torch.arange(2, dtype=torch.int32)) for image in images]
    for shown, glued, expected in zip(*(pixels_of(batch, make_config()) for batch in whole), pixels, strict=True):
        assert torch.equal(shown, expected.permute(1, 2, 0)) and torch.equal(glued, shown)


def test_a_trained_model_finds_its_pairs():
    """Enough steps to learn 12 pairs by heart."""
    torch.manual_seed(0)
    config = make_config()
    config.model.initializer_range = 0.1
    model, seen = build_model(config, len(WORDS)), random_batch(range(12))
    module = PretrainingModule(model, THREE.active)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        module(seen)[0].backward()
        optimizer.step()
        model.rng.advance()
    results = evaluate(model, lambda *_: [seen], config)
    assert (
        results["contrastive"]["image_to_text_recall@1"]
        > 0.9
        > 0.5
        > results["contrastive"]["chance_recall@1"]
    )
    assert results["reranked"]["text_to_image_recall@5"] > 0.9
    assert results["matching"]["accuracy"] > 0.8
    words = results["masked_language"]
    assert words["accuracy"] > words["accuracy_shuffled_image"] + 0.1


def test_the_gallery_is_limited_to_whole_batches():
    for gallery, pairs in ((17, 16), (1, 8)):
        results = evaluate(small_model(), read, make_config(gallery=gallery))
        related = 2  # pairs that show one image, 0 and 5, each with two right answers
        assert results["contrastive"]["chance_recall@1"] == pytest.approx((1 + related / pairs) / pairs)
        assert results["pairs"] == 24, "words are masked in all"
    with pytest.raises(ValueError, match="there are no held-out pairs"):
        evaluate(small_model(), lambda *_: [], make_config())


@torch.no_grad()
def test_matching_of_any_pairs_equals_one_by_one():
    model = small_model().eval()
    gallery = encode_gallery(model, batches())
    images, texts = torch.tensor([3, 3, 17, 20, 0]), torch.tensor([1, 3, 3, 22, 0])
    together = logits_of_pairs(model, gallery, images, texts)
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        source = model.source_of(model.image_states(random_batch(range(int(image), int(image) + 1))))
        alone = matching_logits(
            model, model.fuse(model.text_states(random_batch(range(int(text), int(text) + 1))), source)
        )
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_constant_matching_is_worth_nothing():
    model = small_model().eval()
    model.heads["matching"].classifier.weight.zero_()
    model.heads["matching"].classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    found, blind = told_apart(model, encode_gallery(model, batches())), math.log(2)
    assert found["accuracy"] == 0.5 and found["loss"] > found["loss_even_odds"] == blind
    assert found["loss"] == pytest.approx((math.log(1 + math.e) + math.log(1 + 1 / math.e)) / 2)


def test_zero_shot_reads_a_folder_of_classes(tmp_path):
    random = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = random.integers(0, 60, (16, 12, 3), dtype=np.uint8)
            pixels[..., channel] = 250
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    results = evaluate(
        small_model(), read, make_config(zero_shot=str(tmp_path)), tokenizer=make_tokenizer()
    )
    assert results["zero_shot"]["images"] == 6 and results["zero_shot"]["chance"] == 0.5
    assert 0 <= results["zero_shot"]["accuracy"] <= 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match="at least two sub-folders of images, got .* with 0 sub-folders and 0 images"
    ):
        config = make_config(zero_shot=str(tmp_path / "empty"))
        evaluate(small_model(), read, config, tokenizer=make_tokenizer())


def test_a_run_folder_loads_back(tmp_path):
    model, config = small_model(), make_config()
    export(tmp_path, model, config, make_tokenizer())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    loaded, tokenizer, transform = engine.load(tmp_path)
    assert not loaded.training and tokenizer.vocab_size == len(WORDS)
    batch = random_batch(range(5))
    torch.testing.assert_close(
        loaded.image_features(batch), model.eval().image_features(batch), rtol=0, atol=0
    )
    patches, positions = transform(Image.new("RGB", (20, 20), "white"))
    assert patches.shape[1] == 3 * PATCH**2 and positions.shape == (len(patches), 2)
    assert rebuild(Config, json.loads((tmp_path / "config.json").read_text())) == config


def test_views_of_one_buffer_and_tied_weights_are_written_once(tmp_path):
    """As ZeRO keeps them; and the masked-language decoder tied to itself under a second name."""
    model, config = small_model(), make_config()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    model.tied = model.heads["masked_language"].transform
    export(tmp_path, model, config, make_tokenizer())
    assert load_file(tmp_path / "model.safetensors").keys() == expected.keys()
    for name, tensor in engine.load(tmp_path).model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_weights_of_another_model_are_refused(tmp_path):
    export(tmp_path, small_model(), make_config(), make_tokenizer())
    weights = load_file(tmp_path / "model.safetensors")
    weights["surplus"] = weights.pop("logit_scale")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model of config.json: logit_scale, surplus"):
        engine.load(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a finished run: it has no model.safetensors"):
        engine.load(tmp_path)
