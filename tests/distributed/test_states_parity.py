"""Momentum copies, queues, codebooks and batch norm: 1 and 2 processes x ZeRO 0-3 x accumulation are plain PyTorch."""

from pathlib import Path

import pytest
import states_curves
import torch
from launch import run
from process_group import process_group_of_one
from states_worker import CASES, curves

WORKER = Path(__file__).with_name("states_worker.py")
__all__ = ["process_group_of_one"]


@pytest.fixture(scope="module")
def by_world() -> dict[int, list[dict]]:
    """The states of every rank: one process is this one, two are started."""
    return {1: [curves()], 2: [rank.result() for rank in run([WORKER], world=2)]}


@pytest.mark.parametrize("world", (1, 2))
@pytest.mark.parametrize(("stage", "accumulation"), CASES)
def test_states_are_those_of_one_process_in_plain_pytorch(by_world, world, stage, accumulation):
    expected = states_curves.plain_curve(accumulation)
    for rank in range(world):
        points = by_world[world][rank][f"{stage} {accumulation}"]
        for step, (point, truth) in enumerate(zip(points, expected, strict=True)):
            for name, values in truth.items():
                difference = (torch.tensor(point[name]) - torch.tensor(values)).abs().max().item()
                assert difference < 3e-6, (rank, step, name, difference)


def test_every_state_moves(by_world):
    """What stands still would pass above, were it left out of both."""
    first, last = by_world[2][0]["3 2"][0], by_world[2][0]["3 2"][-1]
    still = {name for name in first if first[name] == last[name]}
    assert still == {"frozen.weight", "frozen.bias"}


def test_states_are_the_same_bits_on_all_ranks(by_world):
    assert by_world[2][0] == by_world[2][1]
