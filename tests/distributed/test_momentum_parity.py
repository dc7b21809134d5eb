"""Momentum copy and queues of a real recipe: two ranks under ZeRO 2 and 3 have the states of one plain process."""

from pathlib import Path

import momentum_curves
import pytest
import torch
from launch import run
from shared_cache import shared_cache

WORKER = Path(__file__).with_name("momentum_worker.py")
__all__ = ["shared_cache"]


@pytest.fixture(scope="module")
def states(shared_cache):
    expected = momentum_curves.plain_states(shared_cache)
    return expected, [rank.result() for rank in run([WORKER, shared_cache], world=2)]


@pytest.mark.parametrize("stage", momentum_curves.STAGES)
def test_weights_copies_and_queues_are_those_of_one_process(states, stage):
    expected, ranks = states
    for rank in ranks:
        found = rank[str(stage)]
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            difference = (torch.tensor(found[name]) - torch.tensor(values)).abs().max().item()
            assert difference < 2e-5, (name, difference)


@pytest.mark.parametrize("stage", momentum_curves.STAGES)
def test_ranks_hold_the_same_bits(states, stage):
    first, second = (rank[str(stage)] for rank in states[1])
    assert first == second


def test_what_follows_has_moved(states):
    """What stands still would pass above, were it left out of both."""
    expected, _ = states
    moved = [name for name in expected if name.startswith("teacher.module.")]
    assert len(moved) > 50
    for name in moved:
        assert expected[name] != expected[name.removeprefix("teacher.module.")], name
