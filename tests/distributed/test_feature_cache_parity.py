"""512 pairs in one step, ITC and MLM together: the same gradients and weights however ranks and micro-batches cut them."""

from pathlib import Path

import cached_steps
import pytest
import torch
from cached_steps import PAIRS, STAGES
from launch import run
from mutants import load_mutant
from process_group import process_group_of_one
from random_batch import random_batch

from engine.objectives.parts import batch_coupled, pretraining
from engine.training import feature_cache, step

WORKER = Path(__file__).with_name("feature_cache_worker.py")
__all__ = ["process_group_of_one"]
ONE_RANK = [(1, PAIRS), *((stage, 128) for stage in STAGES)]
TWO_RANKS_OF = 32


@pytest.fixture(scope="module")
def plain():
    return cached_steps.plain_step()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("steps")
    for finished in run([WORKER, folder, TWO_RANKS_OF], world=2, timeout=150):
        assert finished.code == 0, finished.err
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


def largest_error(found: dict, truth: dict, kind: str) -> tuple[float, str]:
    """Of all parameters, each measured by its own largest value."""
    errors = {
        name: ((found[kind][name] - exact).abs().max() / exact.abs().max()).item() for name, exact in truth[kind].items()
    }
    name = max(errors, key=errors.get)
    return errors[name], name


def same_step(found: dict, truth: dict) -> bool:
    return (
        found["values"] == pytest.approx(truth["values"], rel=1e-5)
        and largest_error(found, truth, "changes")[0] < 1e-4
        and largest_error(found, truth, "weights")[0] < 1e-4
    )


@pytest.mark.parametrize(("stage", "micro_batch"), ONE_RANK)
def test_one_rank(plain, stage, micro_batch):
    found = cached_steps.zero_step(stage, micro_batch)
    assert same_step(found, plain), (largest_error(found, plain, "changes"), found["values"], plain["values"])


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_of_eight_micro_batches(plain, of_two_ranks, stage):
    for rank in of_two_ranks:
        assert same_step(rank[stage], plain), (largest_error(rank[stage], plain, "changes"), rank[stage]["values"])


def distance(found: dict, truth: dict) -> float:
    """Of all gradients together, beside their norm."""
    pairs = [(found["changes"][name].float() - exact, exact) for name, exact in truth["changes"].items()]
    return (sum(error.square().sum() for error, _ in pairs) / sum(exact.square().sum() for _, exact in pairs)).sqrt().item()


@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_is_no_worse_for_the_cut(plain, stage):
    uncut, cut = (distance(cached_steps.zero_step(stage, size, "bf16"), plain) for size in (PAIRS, 128))
    assert cut < 1.2 * uncut < 0.05, (cut, uncut)


def test_zero_3_keeps_the_order_that_it_prefetches_by(monkeypatch):
    """The second reading begins with the whole of the first: what DeepSpeed has recorded is broken off once, at the
    beginning, and not in every step."""
    engine, ranks = cached_steps.zero_engine(3, 128)
    coordinator = engine.deepspeed.optimizer.parameter_offload.get_param_coordinator()
    broken, invalidate = [], coordinator._invalidate_trace
    monkeypatch.setattr(coordinator, "_invalidate_trace", lambda: (broken.append(1), invalidate()))
    window = [random_batch(range(first, first + 4)) for first in range(0, 16, 4)]
    for _ in range(3):
        cached_steps.take_window(engine, ranks, window)
    assert len(broken) == 1


def test_every_parameter_has_a_gradient(plain):
    """But for what matching alone uses."""
    still = {name for name, change in plain["changes"].items() if not change.any()}
    assert still == {f"model.heads.matching.classifier.{kind}" for kind in ("weight", "bias")}


MUTANTS = {
    "the gradient of the scale arrives with every micro-batch": ("[1] * len(numbers)", "[len(parts)] * len(numbers)"),
    "rows count a part of what they should": ("[len(parts)] * len(rows)", "[1] * len(rows)"),
    "every micro-batch has the gradients of the first": ("[*own, *of_numbers]", "[*next(zip(*cut)), *of_numbers]"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(plain, monkeypatch, tmp_path, name):
    mutant = load_mutant(batch_coupled, *MUTANTS[name], tmp_path)
    monkeypatch.setattr(pretraining, "StepLoss", mutant.StepLoss)
    assert not same_step(cached_steps.zero_step(1, 128), plain)


def test_a_second_reading_that_draws_anew_is_noticed(plain, monkeypatch):
    def advancing(engine, *rest):
        firsts = feature_cache.read_ahead(engine, *rest)
        engine.module.model.rng.advance()
        return firsts

    monkeypatch.setattr(step, "read_ahead", advancing)
    assert not same_step(cached_steps.zero_step(1, 128), plain)
