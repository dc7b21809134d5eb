"""Training learns from pairs and from nothing else: with captions permuted over the pictures, retrieval stays at chance."""

import json

import launch
import pytest

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
