"""UNITER on built-in scenes, shrunk: from the recipe to the summary, on one process and on two under ZeRO-3."""

import json
import math
from pathlib import Path

import launch
import pytest

from engine.pretrain import main
from engine.training.telemetry import read_metrics

SCRIPT, RECIPE = launch.ROOT / "engine/pretrain.py", launch.ROOT / "engine/recipes/uniter_scenes.yaml"
BESIDE = {
    "masked_language": {"loss": "loss_shuffled_image", "accuracy": "accuracy_shuffled_image"},
    "random_matching": {"loss": "loss_even_odds", "accuracy": "accuracy_majority"},
    "word_region_alignment": {"distance": "distance_replaced"},
    "masked_region_features": {"loss": "loss_mean_region"},
    "masked_region_classes": {"loss": "loss_class_prior"},
    "retrieval": {"image_to_text_recall@5": "chance_recall@5", "text_to_image_recall@5": "chance_recall@5"},
}
"""Every figure of the recipe with what it is to be compared with."""


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """The folder of both runs."""
    folder = tmp_path_factory.mktemp("runs")
    common = [
        "--config", str(RECIPE), "--tiny", "true", "--device", "cpu", "--output", str(folder),
        "--data.cache", str(folder / "cache"), "--data.max_records", "96", "--evaluation.gallery", "16",
        "--train.global_batch", "2", "--train.max_steps", "6", "--name",
    ]  # fmt: skip
    assert main([*common, "one", "--train.evaluate_every", "3"]) == 0
    for rank in launch.run([SCRIPT, *common, "two", "--zero.stage", "3"], world=2, timeout=240):
        assert rank.code == 0, rank.err
    return folder


def evaluation(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())["evaluation"]


def test_the_summary_has_every_figure_beside_its_baseline(output):
    figures = evaluation(output / "one")
    assert figures.pop("pairs") == 96 and figures.keys() == BESIDE.keys()
    for group, pairs in BESIDE.items():
        for name, other in pairs.items():
            assert 0 <= figures[group][name] < math.inf and 0 < figures[group][other] < math.inf, (group, name)
    rows = read_metrics(output / "one" / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("event") == "evaluation"] == [3, 6]


def test_two_processes_under_zero_3_report_the_same(output):
    """The same steps, rounded in another order."""
    one, two = evaluation(output / "one"), evaluation(output / "two")
    for group, pairs in BESIDE.items():
        for name in pairs if "recall" not in str(pairs) else ():
            assert two[group][name] == pytest.approx(one[group][name], rel=1e-3), (group, name)
