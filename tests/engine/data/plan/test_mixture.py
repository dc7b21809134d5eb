"""One task per optimizer step: drawn by ratio, known on every rank, whatever step a run begins at."""

import numpy as np
import pytest

from engine.data.plan.mixture import Mixture


def test_tasks_are_drawn_by_their_ratios_and_independently():
    """Each share, and that of each pair of neighbours, within 4 standard deviations over 200,000 steps."""
    ratios = np.asarray([9.0, 12.0, 6.0, 6.0, 0.5])
    steps = 200_000
    mixture = Mixture(ratios.tolist(), seed=3)
    drawn = np.asarray([mixture(step)[0] for step in range(steps)])
    shares = ratios / ratios.sum()
    _assert_shares(np.bincount(drawn, minlength=5) / steps, shares, steps)
    pairs = np.bincount(drawn[::2] * 5 + drawn[1::2], minlength=25) / (steps / 2)
    _assert_shares(pairs, np.outer(shares, shares).ravel(), steps / 2)


def _assert_shares(found, expected, draws):
    assert (np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_turns_count_the_earlier_steps_of_the_same_task():
    mixture = Mixture([1.0, 2.0, 3.0], seed=0)
    turns = [0, 0, 0]
    for step in range(5000):
        task, turn = mixture(step)
        assert turn == turns[task]
        turns[task] += 1
    assert min(turns) > 700


@pytest.mark.parametrize("step", [0, 1, 1023, 1024, 1025, 70_000, 500_000])
def test_a_run_may_begin_anywhere(step):
    whole = Mixture([2.0, 1.0, 1.0], seed=1)
    whole(600_000)
    begun = Mixture([2.0, 1.0, 1.0], seed=1)
    assert [begun(step + more) for more in range(3)] == [whole(step + more) for more in range(3)]


def test_seeds_draw_differently():
    drawn = [[Mixture([1.0, 1.0], seed)(step)[0] for step in range(100)] for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_one_task_is_always_drawn():
    assert [Mixture([0.3], seed=0)(step) for step in range(3)] == [(0, 0), (0, 1), (0, 2)]
