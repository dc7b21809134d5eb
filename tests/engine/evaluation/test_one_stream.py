"""Evaluation of one-stream models: figures beside their baselines, whatever the batches; images that are exchanged."""

import dataclasses
import json
import math

import pytest
import torch
from random_pairs import SIZES, TASKS, UNITER, packed, random_pairs, region_batch, small_one_stream

from engine.build import build_model
from engine.config import Config
from engine.evaluation import describe, evaluate
from engine.objectives.parts.other_images import other_images, with_images
from engine.objectives.parts.retrieval import both_ways
from engine.objectives import Objectives
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.masked_region_classes import MaskedRegionClasses
from engine.objectives.masked_region_features import MaskedRegionFeatures
from engine.objectives.random_matching import RandomMatching, matching_logits, matching_retrieval, transport_distance
from engine.sections import Data, DataSet, Evaluation, JointStack, Model, Regions, Train

PAIRS = 24


def make_config(targets: str = "soft") -> Config:
    return Config(
        data=Data(
            sets={"only": DataSet("builtin-scenes", dict.fromkeys(TASKS, 1.0))},
            regions=Regions(feature_values=SIZES.feature_values, classes=SIZES.classes),
            max_caption_tokens=SIZES.max_positions,
        ),
        model=Model(
            image=None, text=None, fusion=None,
            joint=JointStack(width=32, layers=2, heads=4, mlp_width=64, max_positions=SIZES.max_positions, **UNITER),
        ),
        objectives=Objectives(
            masked_language=MaskedLanguage(),
            masked_region_features=MaskedRegionFeatures(),
            masked_region_classes=MaskedRegionClasses(targets=targets),
            random_matching=RandomMatching(),
        ),
        train=Train(max_steps=1),
        evaluation=Evaluation(batch=9, gallery=6),
    )  # fmt: skip


def read(pairs: int, task: str | None) -> list:
    return [region_batch(range(first, min(first + pairs, PAIRS))) for first in range(0, PAIRS, pairs)]


def own_share() -> float:
    return torch.stack([pair.own_image for pair in random_pairs(range(PAIRS))]).float().mean().item()


def masked_classes() -> torch.Tensor:
    return region_batch(range(PAIRS)).views["masked_region_classes"].soft_labels.double()


@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_an_untrained_model_is_at_its_baselines(targets):
    config = make_config(targets)
    model = build_model(config, SIZES.vocab_size)
    results = evaluate(model, read, config)
    assert model.training and json.loads(json.dumps(results)) == results
    assert results["pairs"] == PAIRS
    words, matching = results["masked_language"], results["random_matching"]
    assert words["loss"] == pytest.approx(math.log(SIZES.vocab_size), rel=0.03)
    assert words["loss"] == pytest.approx(words["loss_shuffled_image"], rel=0.01)
    assert words["accuracy_chance"] == 1 / SIZES.vocab_size
    assert matching["loss"] == pytest.approx(matching["loss_even_odds"], abs=0.05)
    assert matching["accuracy"] <= matching["accuracy_majority"] == max(own_share(), 1 - own_share())
    regions, classes = results["masked_region_features"], results["masked_region_classes"]
    assert regions["loss_mean_region"] < regions["loss"] < 1.3 * regions["loss_mean_region"]
    assert classes["loss_class_prior"] < classes["loss"]
    assert ("accuracy" in classes) == (targets == "hard")
    lines = describe(results).splitlines()
    assert len(lines) == 7 and all(line.count("(") == line.count(")") >= 1 for line in lines)
    assert "(even odds 0.6931)" in describe(results) and ", chance 0.833 %)" in describe(results)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_a_blind_model_is_exactly_at_its_baselines(targets):
    """Heads that see nothing and know the answers' mean: every figure is what it is to be compared with."""
    model, labels = small_one_stream(), masked_classes()
    if targets == "hard":
        labels = torch.nn.functional.one_hot(labels[:, 1:].argmax(1) + 1, SIZES.classes).double()
    for head in (model.heads[task] for task in TASKS if task != "random_matching"):
        head.norm.weight.zero_()
        head.norm.bias.zero_()
    whole = region_batch(range(PAIRS))
    features = whole.image.features[whole.views["masked_region_features"].places.rows(whole.image_layout)]
    words = torch.bincount(whole.views["masked_language"].targets, minlength=SIZES.vocab_size)
    model.heads["masked_language"].bias.copy_((words / words.sum() + 1e-12).log())
    model.heads["masked_region_features"].bias.copy_(features.mean(0))
    model.heads["masked_region_classes"].classifier.bias.copy_((labels.mean(0) + 1e-12).log())
    model.heads["random_matching"].weight.zero_()
    model.heads["random_matching"].bias.zero_()
    results = evaluate(model, read, make_config(targets))
    for group in ("masked_language", "random_matching", "masked_region_features", "masked_region_classes"):
        loss, *others = (value for name, value in results[group].items() if name.startswith("loss"))
        assert others == pytest.approx([loss] * len(others), rel=1e-5) and others, group
    assert {"loss_shuffled_image", "loss_unigram"} < results["masked_language"].keys()
    assert results["masked_language"]["accuracy"] == results["masked_language"]["accuracy_shuffled_image"]
    assert results["random_matching"]["accuracy"] == pytest.approx(1 - own_share())
    if targets == "hard":
        figures = results["masked_region_classes"]
        assert figures["accuracy"] == figures["accuracy_most_frequent"] == labels.mean(0).max()


def test_figures_do_not_depend_on_how_batches_are_cut():
    """Not those beside shuffled images, which come from the same batch."""
    model, config = small_one_stream(), make_config()
    cut = evaluate(model, read, config)
    config.evaluation.batch = PAIRS
    whole = evaluate(model, read, config)
    for group, figures in whole.items():
        for name, value in figures.items() if isinstance(figures, dict) else ():
            if "shuffled" not in name:
                assert cut[group][name] == pytest.approx(value, rel=1e-4), (group, name)


@torch.no_grad()
def test_distances_are_means_over_pairs_of_their_kind():
    model, batch = small_one_stream().eval(), region_batch(range(PAIRS))
    distance, own = transport_distance(model, model.joint_states(batch), None), batch.views["random_matching"] == 1
    figures = evaluate(model, read, make_config())["word_region_alignment"]
    assert figures["distance"] == pytest.approx(distance[own].mean().item(), rel=1e-4)
    assert figures["distance_replaced"] == pytest.approx(distance[~own].mean().item(), rel=1e-4)


@pytest.mark.parametrize("labels", [[3, 1, 2], [5, 7, 5, 7, 7, 9], [1, 1, 2, 2], list(range(40)) + [1] * 20])
def test_other_images_are_other_images(labels):
    labels = torch.tensor(labels)
    others = other_images(labels)
    assert sorted(others.tolist()) == list(range(len(labels)))
    assert (labels[others] != labels).all()


@pytest.mark.parametrize("labels", [[4], [4, 4], [1, 2, 2]])
def test_where_too_many_images_are_the_same_there_are_no_others(labels):
    assert other_images(torch.tensor(labels)) is None


@torch.no_grad()
def test_shuffling_changes_images_and_nothing_else():
    pairs, index = random_pairs(range(8)), torch.tensor([3, 0, 0, 7, 1, 2, 6, 5])
    image = ("features", "boxes", "region_masked", "soft_labels")
    expected = packed([
        dataclasses.replace(pair, **{name: getattr(pairs[other], name) for name in image})
        for pair, other in zip(pairs, index.tolist(), strict=True)
    ])  # fmt: skip
    own = packed(pairs)
    shuffled = with_images(own, index)
    assert torch.equal(shuffled.layout.lengths, expected.layout.lengths)
    assert torch.equal(shuffled.image.features, expected.image.features)
    assert torch.equal(shuffled.image.boxes, expected.image.boxes)
    model = small_one_stream().eval()
    states = [model.joint_states(batch, "masked_language").hidden for batch in (shuffled, expected)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
    results = evaluate(model, read, make_config())["masked_language"]
    assert abs(results["loss"] - results["loss_shuffled_image"]) > 1e-3


@torch.no_grad()
def test_retrieval_reads_every_caption_with_every_image():
    model, pairs = small_one_stream().eval(), random_pairs(range(6))
    scores = torch.empty(6, 6)
    for image, text in torch.cartesian_prod(torch.arange(6), torch.arange(6)).tolist():
        pair = dataclasses.replace(pairs[text], features=pairs[image].features, boxes=pairs[image].boxes)
        logits = matching_logits(model, packed([pair]))[0]
        scores[image, text] = logits[1] - logits[0]
    expected = both_ways(scores, scores.T, torch.eye(6, dtype=torch.bool))
    assert matching_retrieval(model, packed(pairs)) == expected
    assert evaluate(model, read, make_config())["retrieval"] == expected


def test_nothing_to_evaluate_is_one_line():
    with pytest.raises(ValueError, match="there are no held-out masked words beside two different images"):
        evaluate(small_one_stream(), lambda *_: [], make_config())
    with pytest.raises(ValueError, match="there are no held-out masked words beside two different images"):
        evaluate(small_one_stream(), lambda *_: [region_batch([1])], make_config())


def test_zero_shot_classification_needs_towers():
    config = make_config()
    with pytest.raises(ValueError, match="evaluation.zero_shot compares features of two towers"):
        dataclasses.replace(config, evaluation=Evaluation(zero_shot="folder"))
