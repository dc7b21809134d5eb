"""Next sentences and their order: odds, cuts, truncation as the public loop does it."""

import numpy as np
import pytest

from engine.corruption.sentence_pairs import next_sentence, sentence_order, truncate

CHUNK = [np.asarray([10, 11]), np.asarray([20, 21, 22]), np.asarray([30])]
OTHER = [np.asarray([90, 91]), np.asarray([92, 93]), np.asarray([94, 95])]


def one_by_one(first, second, limit, fronts):
    """BERT's loop: the longer one, or else the second, loses a token in front or at the end."""
    parts = [list(first), list(second)]
    while len(parts[0]) + len(parts[1]) > limit:
        longer = 0 if len(parts[0]) > len(parts[1]) else 1
        parts[longer].pop(0 if next(fronts) else -1)
    return parts


@pytest.mark.parametrize("first", range(1, 13))
def test_truncation_leaves_what_the_loop_leaves(first):
    for second in range(1, 13):
        for limit in range(2, 13):
            a, b = truncate(np.arange(first), np.arange(second), limit, np.random.default_rng(0))
            x, y = one_by_one(range(first), range(second), limit, iter(lambda: True, None))
            assert (len(a), len(b)) == (len(x), len(y)), (first, second, limit)
            for part in (a, b):
                assert (np.diff(part) == 1).all()


def test_tokens_go_from_both_ends_with_even_odds():
    fronts = [truncate(np.arange(100), np.arange(10), 30, np.random.default_rng(seed))[0][0] for seed in range(2000)]
    assert abs(np.mean(fronts) - 40) < 4 * np.sqrt(80 / 4 / 2000) and np.std(fronts) > 3


def test_half_of_the_second_segments_are_of_another_document():
    labels, cuts = [], set()
    for seed in range(2000):
        pair = next_sentence(CHUNK, OTHER, 100, np.random.default_rng(seed))
        labels.append(pair.label)
        cuts.add(pair.first.tolist().__len__())
        joined = [*pair.first, *pair.second]
        assert joined == [10, 11, 20, 21, 22, 30] if pair.label == 0 else pair.second.tolist() == [*range(90, 96)]
    assert cuts == {2, 5} and abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(2000)


def test_another_document_fills_what_the_first_segment_leaves():
    """One sentence always meets it: 10 - 5 tokens are filled by three sentences of 2, cut to fit."""
    pair = next_sentence([np.asarray([1, 2, 3, 4, 5])], OTHER, 8, np.random.default_rng(0))
    assert pair.label == 1 and len(pair.first) + len(pair.second) == 8 and len(pair.second) == 4 - 1 + (len(pair.first) == 4)
    short = next_sentence([np.asarray([1])], OTHER, 3, np.random.default_rng(0))
    assert (short.first.tolist(), short.second.tolist()) == ([1], [90, 91])


def test_half_of_the_chunks_are_swapped():
    labels = []
    for seed in range(2000):
        pair = sentence_order(CHUNK, 100, np.random.default_rng(seed))
        parts = [pair.second, pair.first] if pair.label else [pair.first, pair.second]
        assert np.concatenate(parts).tolist() == [10, 11, 20, 21, 22, 30]
        labels.append(pair.label)
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(2000)
