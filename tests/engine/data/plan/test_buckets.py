"""Bucketed batches: UNITER's rule, every example once per epoch, any position at any time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import DataError
from engine.data.plan.buckets import BucketPlan, check_budget
from engine.data.plan.order import Purpose, generator
from engine.sections import Buckets


def plan_of(lengths, seed=0, stream=0, **options):
    return BucketPlan(lambda epoch: lengths, len(lengths), Buckets(**options), seed, stream)


def batches_of_epoch(plan, epoch):
    """Every batch of an epoch, in the order of the stream."""
    first = 0
    while plan.examples(first, 1)[0][0] < epoch:
        first += 1
    batches = []
    while (batch := plan.examples(first, 1))[0][0] == epoch:
        batches.append([example for _, example in batch])
        first += 1
    return batches


def published(lengths, order, tokens, size, multiple):
    """The released sampler, loop for loop, up to its last shuffle; `longest` never falls, as there."""
    batches = []
    for first in range(0, len(order), size):
        bucket = sorted(order[first : first + size], key=lambda example: lengths[example], reverse=True)
        longest, batch = 0, []
        for place in range(0, len(bucket), multiple):
            group = bucket[place : place + multiple]
            longest = max(longest, max(lengths[example] for example in group))
            if longest * (len(batch) + multiple) > tokens:
                assert batch
                batches.append(batch)
                batch = list(group)
            else:
                batch += group
        batches.append(batch)  # dropped there in training
    return batches


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=200),
    tokens=st.integers(240, 900),
    size=st.integers(1, 70),
    multiple=st.integers(1, 4),
    epoch=st.integers(0, 2),
)
def test_batches_are_those_of_the_published_rule(lengths, tokens, size, multiple, epoch):
    plan = plan_of(np.asarray(lengths, np.int32), tokens=tokens, size=size, multiple=multiple)
    order = generator(0, epoch, 0, Purpose.ORDER).permutation(np.arange(len(lengths), dtype=np.int32))
    expected = published(lengths, order.tolist(), tokens, size, multiple)
    assert sorted(batches_of_epoch(plan, epoch)) == sorted(expected)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=100),
    position=st.integers(0, 60),
    count=st.integers(1, 40),
    size=st.sampled_from([4, 16, 64]),
)
def test_any_stretch_equals_that_part_of_the_whole(lengths, position, count, size):
    """Epochs of different numbers of batches, begun anywhere; counts of examples agree with the examples."""
    options = {"tokens": 240, "size": size, "multiple": 2}
    whole, begun = (plan_of(np.asarray(lengths, np.int32), **options) for _ in range(2))
    units = [whole.examples(unit, 1) for unit in range(position + count)]
    assert begun.examples(position, count) == [one for unit in units[position:] for one in unit]
    assert begun.examples_before(position) == sum(map(len, units[:position]))


def test_epochs_have_every_example_once_and_other_batches():
    lengths = np.random.default_rng(0).integers(5, 60, 500)
    plan = plan_of(lengths, tokens=480, size=64, multiple=2)
    epochs = [batches_of_epoch(plan, epoch) for epoch in range(3)]
    assert all(sorted(sum(batches, [])) == list(range(500)) for batches in epochs)
    together = [frozenset(batch) for batch in epochs[0]]
    assert not set(together) & set(map(frozenset, epochs[1]))
    assert epochs[0] != batches_of_epoch(plan_of(lengths, stream=1, tokens=480, size=64, multiple=2), 0)


def test_the_batches_of_an_epoch_are_shuffled():
    lengths = np.arange(1, 1025)
    plan = plan_of(lengths, tokens=16 * 1024, size=1024, multiple=2)
    longest = np.asarray([max(batch) for batch in batches_of_epoch(plan, 0)])
    assert len(longest) == 64
    falls = (np.diff(longest) < 0).mean()
    assert 0.25 < falls < 0.75, "sorted batches would fall always, or never"


def test_lengths_may_change_from_epoch_to_epoch():
    """The plan asks for those of the epoch; prefix sums hold where numbers of batches differ."""
    lengths = [np.full(40, length) for length in (10, 40, 10, 20)]
    plan = BucketPlan(lambda epoch: lengths[epoch % 4], 40, Buckets(tokens=80, size=40, multiple=2), 0)
    sizes = [len(plan.examples(unit, 1)) for unit in range(40)]
    assert sizes[:5] == [8] * 5 and sizes[5:25] == [2] * 20 and sizes[25:30] == [8] * 5
    assert sizes[30:40] == [4] * 10 and plan.examples_before(40) == 160


def test_buckets_save_padding():
    """Lengths like COCO's, UNITER's sizes: little is padded, much is in random batches."""
    random = np.random.default_rng(0)
    lengths = random.integers(10, 21, 50_000) + np.round(10 + 90 * random.beta(2, 4, 50_000)).astype(int)
    plan = plan_of(lengths, tokens=10_240, size=8192, multiple=8)
    batches = [lengths[batch] for batch in batches_of_epoch(plan, 0)]
    padded = sum(batch.max() * len(batch) for batch in batches)
    assert all(batch.max() * len(batch) <= 10_240 for batch in batches)
    assert 1.0 < padded / lengths.sum() < 1.03
    pairs = len(batches[0])
    at_random = random.permutation(lengths)[: 50_000 // pairs * pairs].reshape(-1, pairs)
    assert (at_random.max(1) * pairs).sum() / at_random.sum() > 1.6


def test_an_example_longer_than_the_budget_is_refused():
    check_budget(Buckets(tokens=480, multiple=8), 60, "coco")
    expected = (
        r"^train.buckets.tokens must hold train.buckets.multiple = 8 examples of 61 tokens, "
        r"the longest of coco, 488 tokens in all, got 480$"
    )
    with pytest.raises(DataError, match=expected):
        check_budget(Buckets(tokens=480, multiple=8), 61, "coco")
