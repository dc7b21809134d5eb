"""Parameter groups and the learning rate."""

import pytest
import torch
from standin import StandIn, small_config

from engine.sections import Optimizer, Rule, Schedule
from engine.training.optimizer import LearningRate, freeze, lr_factor, make_optimizer, parameter_groups


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


def test_freezing_by_prefix():
    model = StandIn(0)
    freeze(["trunk", "branch.w"], model.named_parameters())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "trunk.weight",
        "trunk.bias",
        "branch.weight",
    }
    with pytest.raises(ValueError, match="optimizer.freeze: no parameter name begins with tower"):
        freeze(["head", "tower"], model.named_parameters())
    with pytest.raises(ValueError, match="leave nothing to train"):
        freeze(["trunk", "norm", "branch", "head", "scale"], model.named_parameters())


def test_rules_by_prefix():
    model = StandIn(0)
    rules = {"trunk": Rule(kind="sgd", lr=2.0, momentum=0.9), "trunk.bias": Rule(lr=3.0), "head": Rule(weight_decay=0.0)}
    options = Optimizer(lr=1.0, weight_decay=0.1, rules=rules, lr_multipliers={"trunk": 0.5})
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: {name: value for name, value in group.items() if name != "params"}
        for group in parameter_groups(options, model.named_parameters())
        for p in group["params"]
    }
    assert found["trunk.weight"] == {"kind": "sgd", "lr": 1.0, "weight_decay": 0.1, "momentum": 0.9}
    assert found["trunk.bias"] == {"kind": "adamw", "lr": 1.5, "weight_decay": 0.0}
    assert found["head.weight"] == {"kind": "adamw", "lr": 1.0, "weight_decay": 0.0}
    assert found["branch.weight"] == {"kind": "adamw", "lr": 1.0, "weight_decay": 0.1}
    with pytest.raises(ValueError, match="optimizer.rules: no parameter name begins with tower"):
        parameter_groups(Optimizer(rules={"tower": Rule()}), model.named_parameters())


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (Rule(kind="lamb"), "optimizer.rules.trunk.kind 'lamb' needs whole parameters but ZeRO gives it flat partitions"),
        (Rule(lr=0.0), "optimizer.rules.trunk.lr must be positive, got 0.0"),
        (Rule(weight_decay=-1.0), "optimizer.rules.trunk.weight_decay must not be negative, got -1.0"),
        (Rule(momentum=1.0), r"optimizer.rules.trunk.momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_wrong_rule_is_one_line(rule, line):
    with pytest.raises(ValueError, match=line):
        Optimizer(rules={"trunk": rule})


def test_two_rules_in_one_optimizer_are_two_optimizers():
    """Their states too, after a copy of them is loaded."""
    options = Optimizer(lr=0.1, rules={"trunk": Rule(kind="sgd", lr=0.2, momentum=0.9)})
    ours, apart = StandIn(3), StandIn(3)
    apart.load_state_dict(ours.state_dict())
    both = make_optimizer(options, ours.named_parameters(), torch.device("cpu"))
    one = make_optimizer(
        Optimizer(kind="sgd", lr=0.2, momentum=0.9),
        [(name, p) for name, p in apart.named_parameters() if name.startswith("trunk")],
        torch.device("cpu"),
    )
    other = make_optimizer(
        Optimizer(lr=0.1),
        [(name, p) for name, p in apart.named_parameters() if not name.startswith("trunk")],
        torch.device("cpu"),
    )
    for step in range(4):
        for mine, theirs in zip(ours.parameters(), apart.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape)
            theirs.grad = mine.grad.clone()
        for optimizer in (both, one, other):
            optimizer.step()
        if step == 1:
            saved, both = both.state_dict(), make_optimizer(options, ours.named_parameters(), torch.device("cpu"))
            both.load_state_dict(saved)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours.parameters(), apart.parameters(), strict=True))


def test_the_rates_of_published_systems():
    def at(schedule: Schedule, *steps: int) -> list[float]:
        return [lr_factor(schedule, step, 400) for step in steps]

    soho = Schedule("step", decay_at=(25 / 40, 35 / 40), warmup_steps=10)
    assert at(soho, 0, 249, 250, 349, 350) == pytest.approx([0.1, 1.0, 0.1, 0.1, 0.01])
    blip = Schedule("epoch", factor=0.9, epochs=20)
    assert at(blip, 0, 19, 20, 399) == pytest.approx([1.0, 1.0, 0.9, 0.9**19])
    t5 = Schedule("rsqrt", flat_steps=100)
    assert at(t5, 0, 100, 400) == pytest.approx([1.0, 1.0, 0.5])
    assert at(Schedule("rsqrt", flat_steps=1, min_lr_ratio=0.2), 399) == [0.2]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"kind": "step"}, "schedule.decay_at and schedule.kind step need each other, got \\[\\] with kind step"),
        ({"decay_at": (0.5,)}, "need each other, got \\[0.5\\] with kind cosine"),
        ({"kind": "step", "decay_at": (0.5, 0.2)}, "schedule.decay_at must rise and lie between 0 and 1"),
        ({"kind": "epoch", "epochs": 0}, "schedule.epochs must be positive, got 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_line(options, line):
    with pytest.raises(ValueError, match=line):
        Schedule(**options)


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
