"""1 and 2 processes x ZeRO 0-3: gradients and losses are those of plain PyTorch on the concatenated batch."""

from pathlib import Path

import pytest
import quickstart_curves
import standin_curves
import torch
from launch import run
from process_group import process_group_of_one
from zero_worker import STAGES, curves

WORKER = Path(__file__).with_name("zero_worker.py")
__all__ = ["process_group_of_one"]
WORLDS = (1, 2)
LOSSES = {"loss", "contrastive", "matching", "masked_language"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def plain_quickstart(cache) -> list[dict]:
    return quickstart_curves.plain_curve(cache)


@pytest.fixture(scope="module")
def by_world(cache, plain_quickstart) -> dict[int, list[dict]]:
    """The curves of every rank: one process is this one, two are started."""
    two = [rank.result() for rank in run([WORKER, cache], world=2, timeout=150)]
    return {1: [curves(cache)], 2: two}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_quickstart_learns_as_one_process_without_deepspeed(plain_quickstart, by_world, world, stage):
    """All three losses, global negatives, dropout everywhere, ragged batches."""
    for rank in range(world):
        points = by_world[world][rank]["quickstart"][str(stage)]
        for step, (truth, point) in enumerate(zip(plain_quickstart, points, strict=True)):
            assert set(point["losses"]) == LOSSES
            assert point["losses"] == pytest.approx(truth["losses"], rel=1e-5), (rank, step)
        gradients = {name: torch.tensor(values) for name, values in plain_quickstart[-1]["changes"].items()}
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for name, gradient in gradients.items():
            error = (torch.tensor(points[-1]["changes"][name]) - gradient).abs().max().item()
            assert error < 1e-4 * gradient.abs().max().item() + 1e-6 * largest, (rank, name, error / largest)


def test_every_part_of_the_quickstart_has_a_gradient(plain_quickstart):
    assert [name for name, change in plain_quickstart[-1]["changes"].items() if not any(change)] == []


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", standin_curves.KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_and_branches_that_are_left_out(by_world, world, kind, stage):
    """Counts differ between ranks and micro-steps; a branch that is not used has the gradient 0 in every
    stage, so decay and moments move it alike."""
    options = standin_curves.KINDS[kind]
    expected = standin_curves.plain_curve(options["optimizer"], options["alternate"])
    for rank in range(world):
        points = by_world[world][rank]["standin"][f"{stage} {kind}"]
        for step, (point, truth) in enumerate(zip(points, expected, strict=True)):
            assert point["loss"] == pytest.approx(truth["loss"], rel=1e-6), (rank, step)
            assert point["gradient_norm"] == pytest.approx(truth["gradient_norm"], rel=1e-5), (rank, step)
            for name, weights in truth["weights"].items():
                # SGD without momentum: equal weights after every step are equal gradients in every step
                difference = (torch.tensor(point["weights"][name]) - torch.tensor(weights)).abs().max().item()
                assert difference < 2e-6, (rank, step, name, difference)
