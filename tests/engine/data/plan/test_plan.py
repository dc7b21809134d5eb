"""The order of a run: a permutation per epoch, a pure function of the position."""

import numpy as np
import pytest

from engine.data.plan.order import PairPlan, Permutation, Purpose, generator


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_every_epoch_is_a_permutation(size):
    plan = PairPlan(size, seed=3)
    orders = []
    for epoch in range(3):
        found = plan.examples(epoch * size, size)
        assert {number for number, _ in found} == {epoch}
        orders.append([record for _, record in found])
        assert sorted(orders[-1]) == list(range(size))
    if size > 16:
        assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(size))


def test_any_stretch_equals_that_part_of_the_whole():
    plan = PairPlan(37, seed=1)
    whole = plan.examples(0, 200)
    for position, count in ((0, 0), (0, 1), (30, 20), (36, 2), (37, 37), (10, 150)):
        assert plan.examples(position, count) == whole[position : position + count]


def test_seeds_give_different_orders():
    assert PairPlan(1000, 0).examples(0, 1000) != PairPlan(1000, 1).examples(0, 1000)


def test_a_permutation_of_many_records_is_evaluated_where_it_is_asked():
    size = 3_000_000_000
    permutation = Permutation(size, 0, 0, Purpose.ORDER)
    found = permutation(np.arange(size - 10_000, size))
    assert len(set(found.tolist())) == 10_000 and found.min() >= 0 and found.max() < size
    assert abs(found.mean() / size - 0.5) < 0.02


def test_every_record_is_equally_likely_at_every_place():
    """Chi-square over 3,000 epochs of 12 records and over neighbouring pairs, within 5 deviations."""
    epochs, size = 3_000, 12
    orders = np.stack(
        [Permutation(size, 0, epoch, Purpose.ORDER)(np.arange(size)) for epoch in range(epochs)]
    )
    places = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    _assert_uniform(places, epochs / size, (size - 1) ** 2)
    pairs = np.zeros((size, size))
    np.add.at(pairs, (orders[:, 0], orders[:, 1]), 1)
    off_diagonal = ~np.eye(size, dtype=bool)
    _assert_uniform(pairs[off_diagonal], epochs / (size * (size - 1)), size * (size - 1) - 1)


def _assert_uniform(counts, expected, freedom):
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * np.sqrt(2 * freedom)


def test_replacements_are_drawn_from_all_records():
    plan = PairPlan(10, seed=0)
    drawn = {plan.replacement(position, attempt) for position in range(10) for attempt in range(20)}
    assert {record for _, record in drawn} == set(range(10)) and {epoch for epoch, _ in drawn} == {0}


def test_generators_of_different_choices_differ_and_repeat():
    keys = [
        (seed, epoch, record, purpose)
        for seed in (0, 1)
        for epoch in (0, 1)
        for record in (0, 1)
        for purpose in (1, 2)
    ]
    draws = [generator(*key).random(4).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert draws == [generator(*key).random(4).tolist() for key in keys]


def test_an_empty_plan_is_refused():
    with pytest.raises(ValueError, match="num_examples must be at least 1, got 0"):
        PairPlan(0, seed=0)
