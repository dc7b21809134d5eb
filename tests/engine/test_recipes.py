"""UNITER's recipes state what was published; where two say the same, they say it alike."""

import dataclasses

import pytest

from engine.sections import Buckets
from engine.training.command_line import parse

GPUS, ACCUMULATION = {"base": 8, "large": 16}, {"base": 6, "large": 4}
PUBLISHED = {
    "base": {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072, "tokens": 10_240, "steps": 200_000},
    "large": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096, "tokens": 6144, "steps": 500_000},
}
RATIOS = {  # ITM, MLM, MRFR, MRC-kl
    "coco": (6, 8, 4, 4), "vg": (9, 12, 6, 6), "cc": (9, 12, 6, 6), "sbu": (6, 8, 4, 4),
}  # fmt: skip
TASKS = ("random_matching", "masked_language", "masked_region_features", "masked_region_classes")


def recipe(size):
    return parse([f"--config=engine/recipes/uniter_{size}.yaml"])


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_uniter_is_as_published(size):
    run, published = recipe(size), PUBLISHED[size]
    joint, optimizer, train = run.model.joint, run.optimizer, run.train
    assert {name: getattr(joint, name) for name in ("width", "layers", "heads", "mlp_width")} == {
        name: published[name] for name in ("width", "layers", "heads", "mlp_width")
    }
    assert (joint.norm, joint.activation, joint.eps, joint.max_positions) == ("post", "gelu", 1e-12, 512)
    assert joint.dropout == joint.attention_dropout == 0.1 and run.model.initializer_range == 0.02
    assert {name: one.tasks for name, one in run.data.sets.items()} == {
        name: dict(zip(TASKS, ratios, strict=True)) for name, ratios in RATIOS.items()
    }
    assert dataclasses.astuple(run.data.regions) == (2048, 1601, 0.2, 10, 100)
    assert run.data.max_caption_tokens == 60 + 2
    assert train.buckets == Buckets(tokens=published["tokens"], size=8192, multiple=8)
    assert (train.accumulation, train.global_batch) == (ACCUMULATION[size], GPUS[size] * ACCUMULATION[size])
    assert (train.max_steps, run.schedule.kind, run.schedule.warmup_steps) == (
        published["steps"],
        "linear",
        10_000,
    )
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (5e-5, (0.9, 0.98), 0.01)
    objectives = run.objectives
    shares = [objectives.masked_language, objectives.masked_region_features, objectives.masked_region_classes]
    assert [one.probability for one in shares] == [0.15] * 3
    assert (objectives.masked_language.when_none, objectives.masked_language.whole_word) == ("first", False)
    assert objectives.masked_region_classes.targets == "soft"
    assert (objectives.random_matching.probability, objectives.random_matching.alignment) == (0.5, 0.1)
    assert {getattr(objectives, task).weight for task in TASKS} == {1.0}


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_clip_and_eps_are_for_a_mean_where_the_release_sums_over_accumulation(size):
    optimizer = recipe(size).optimizer
    assert optimizer.clip * ACCUMULATION[size] == pytest.approx(5, rel=1e-6)
    assert optimizer.eps * ACCUMULATION[size] == pytest.approx(1e-6, rel=1e-6)


def test_base_and_large_differ_in_size_alone():
    base, large = recipe("base"), recipe("large")
    large.name, large.system = base.name, base.system
    large.model.joint = base.model.joint
    large.optimizer.clip, large.optimizer.eps = base.optimizer.clip, base.optimizer.eps
    large.train = base.train
    assert large == base
