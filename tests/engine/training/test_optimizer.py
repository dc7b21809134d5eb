"""Parameter groups and the learning rate."""

import pytest
import torch
from standin import StandIn, small_config

from engine.sections import Optimizer, Schedule
from engine.training.optimizer import LearningRate, lr_factor, make_optimizer, parameter_groups


def names_by_group(options: Optimizer) -> dict[tuple[float, float], set[str]]:
    model = StandIn(0)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(options, model.named_parameters())
    return {(g["weight_decay"], g["lr"]): {names[id(p)] for p in g["params"]} for g in groups}


def test_vectors_do_not_decay():
    groups = names_by_group(Optimizer(lr=1.0, weight_decay=0.1))
    assert groups[0.1, 1.0] == {"trunk.weight", "branch.weight", "head.weight"}
    assert groups[0.0, 1.0] == {"scale", "trunk.bias", "norm.weight", "norm.bias", "branch.bias", "head.bias"}


def test_the_longest_prefix_sets_the_rate():
    multipliers = {"trunk": 0.5, "trunk.bias": 0.25, "scale": 0.0}
    groups = names_by_group(Optimizer(lr=1.0, weight_decay=0.1, lr_multipliers=multipliers))
    assert groups[0.1, 0.5] == {"trunk.weight"} and groups[0.0, 0.25] == {"trunk.bias"}
    assert groups[0.0, 0.0] == {"scale"}


def test_a_prefix_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="no parameter name begins with tower"):
        names_by_group(Optimizer(lr_multipliers={"tower": 0.5}))


def test_frozen_parameters_are_left_out():
    model = StandIn(0)
    model.head.requires_grad_(False)
    groups = parameter_groups(Optimizer(), model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == 7


def test_the_rate_rises_and_falls():
    def shape(kind: str) -> list[float]:
        schedule = Schedule(kind, warmup_steps=2, min_lr_ratio=0.2)
        return [lr_factor(schedule, step, 10) for step in (0, 1, 2, 6, 10)]

    assert shape("cosine") == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2])
    assert shape("linear") == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2])
    assert shape("constant") == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])
    assert lr_factor(Schedule("cosine"), 25, 100) > lr_factor(Schedule("linear"), 25, 100)


def test_every_group_keeps_its_multiplier():
    config = small_config(
        schedule=Schedule("linear", warmup_steps=2),
        optimizer=Optimizer(lr=1.0, lr_multipliers={"trunk": 0.5}),
        max_steps=10,
    )
    optimizer = make_optimizer(config.optimizer, StandIn(0).named_parameters(), torch.device("cpu"))
    assert LearningRate(config, optimizer).set(0) == 0.5
    assert {group["lr"] for group in optimizer.param_groups} == {0.5, 0.25}
