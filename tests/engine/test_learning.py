"""Training learns from pairs and from nothing else: with captions permuted over the pictures, retrieval stays at chance;
and every objective of UNITER's learns a few pairs by heart."""

import json
import math

import launch
import pytest
import torch
from random_pairs import SIZES, TASKS, region_batch, small_one_stream

from engine.batch import Batch
from engine.objectives.parts.baselines import ClassPrior, MeanRegion
from engine.objectives import Objectives, PretrainingModule
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.masked_region_classes import MaskedRegionClasses
from engine.objectives.masked_region_features import MaskedRegionFeatures
from engine.objectives.random_matching import RandomMatching

RECIPE = "engine/recipes/quickstart.yaml"
PAIRS = 12_800
SHORT = [
    "--objectives.matching", "null", "--objectives.masked_language", "null",
    "--train.max_pairs", PAIRS, "--train.save_every", 0, "--evaluation.rerank_top", 0,
]  # fmt: skip


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """Two short contrastive runs side by side, alike but for the permutation."""
    folder = tmp_path_factory.mktemp("runs")
    running = [
        launch.start(
            [launch.ROOT / "engine/pretrain.py", "--config", launch.ROOT / RECIPE, "--output", folder, "--name", name,
             "--data.cache", folder / f"cache-{name}", "--data.permute_captions", permuted, *SHORT],
        )  # fmt: skip
        for name, permuted in (("paired", "false"), ("permuted", "true"))
    ]
    for processes in running:
        assert launch.finish(processes, timeout=280)[0].code == 0
    return {name: json.loads((folder / name / "summary.json").read_text()) for name in ("paired", "permuted")}


def recalls_at_10(summary):
    figures = summary["evaluation"]["contrastive"]
    assert summary["evaluation"]["pairs"] == 800 and figures["chance_recall@10"] == pytest.approx(10 / 800, rel=0.05)
    return [figures[f"{way}_recall@10"] for way in ("image_to_text", "text_to_image")]


def test_pairs_teach(summaries):
    assert min(recalls_at_10(summaries["paired"])) > 5 * 10 / 800


def test_permuted_captions_teach_nothing(summaries):
    # At chance 10 of 800 queries find their pair among the first ten, with a standard deviation of 3.2.
    assert max(recalls_at_10(summaries["permuted"])) < (10 + 5 * 3.2) / 800


def learn_by_heart(batch: Batch, task: str) -> tuple[dict[str, float], dict[str, float]]:
    """Losses and report of one objective after 300 steps on one batch."""
    options = Objectives(
        masked_language=MaskedLanguage(),
        masked_region_features=MaskedRegionFeatures(),
        masked_region_classes=MaskedRegionClasses(),
        random_matching=RandomMatching(alignment=1.0),
    )
    batch.task = (task,)
    module = PretrainingModule(small_one_stream(), options.active)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(300):
        total, losses, report = module(batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return tuple({name: value.item() for name, value in named.items()} for named in (losses, report))


@pytest.mark.parametrize("task", TASKS)
def test_eight_pairs_are_learnt_by_heart(task):
    """To a hundredth of the loss that is to be had blindly; and words move towards the regions of their own image."""
    batch, mean, prior = region_batch(range(8)), MeanRegion(), ClassPrior()
    mean.add(batch.image.features[batch.views["masked_region_features"].places.rows(batch.image_layout)])
    prior.add(batch.views["masked_region_classes"].soft_labels)
    blind = {
        "masked_language": math.log(SIZES.vocab_size),
        "masked_region_features": mean.squared_error,
        "masked_region_classes": prior.divergence / SIZES.classes,
        "random_matching": math.log(2),
    }
    losses, report = learn_by_heart(batch, task)
    assert losses[task] < 0.01 * blind[task]
    if task == "random_matching":
        assert 0 < batch.views["random_matching"].sum() < 8 and report["matching_accuracy"] == 1
        assert report["transport_own"] < 0.1 * report["transport_replaced"]
