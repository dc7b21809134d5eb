"""BART's noises: what each leaves, and how often it strikes."""

import numpy as np
import pytest

from engine.corruption import restoration
from engine.corruption.restoration import delete_tokens, infill, mask_tokens, permute_sentences, rotate

MASK = 1


def text(words, pieces=1):
    numbers = np.concatenate([[-1], np.repeat(np.arange(words), pieces), [-1]])
    return np.concatenate([[0], np.arange(10, 10 + words * pieces), [2]]), numbers


def test_tokens_are_masked_or_deleted_by_their_share_and_specials_never():
    ids, words = text(50_000)
    masked = mask_tokens(ids, words, MASK, 0.15, np.random.default_rng(0))
    deleted = delete_tokens(ids, words, 0.15, np.random.default_rng(0))
    hidden = masked == MASK
    assert abs(hidden.sum() / 50_000 - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 50_000)
    assert np.array_equal(deleted, ids[~hidden]) and np.array_equal(masked[~hidden], ids[~hidden])
    assert (deleted[0], deleted[-1]) == (0, 2)


class Scripted:
    def __init__(self, lengths, *orders):
        self.lengths, self.orders = np.asarray(lengths), iter(orders)

    def poisson(self, mean, size):
        assert mean == 3.0
        return np.resize(self.lengths, size)

    def permutation(self, count):
        return np.asarray(next(self.orders))


def test_infilling_by_hand():
    """10 words, budget 5: lengths 2, 0, 3 begin at words 7 and 1, the empty one before what has become token 3."""
    ids, words = text(10)
    filled = infill(ids, words, MASK, 0.5, Scripted([2, 0, 4, 9, 9], [7, 1, 0], [2, 0]))
    # word 1, 2, 3 and 7, 8 become a mask each: 0 | 10 MASK 14 15 16 MASK 19 | 2, and one mask at place 3
    assert filled.tolist() == [0, 10, MASK, MASK, 14, 15, 16, MASK, 19, 2]


def test_a_span_that_runs_into_another_takes_its_mask_and_none_leaves_the_text():
    ids, words = text(6, pieces=2)
    filled = infill(ids, words, MASK, 1.0, Scripted([3, 2, 1], [1, 3, 5], [0]))
    # words 1 2 3, then 3 4, then 5, of two tokens each: the second mask lies inside the first span
    assert filled.tolist() == [0, 10, 11, MASK, MASK, 2]
    long = infill(ids, words, MASK, 0.5, Scripted([3], [5], [0]))
    assert long.tolist() == [*range(0, 1), *range(10, 20), MASK, 2]


def test_an_infilled_text_has_the_masks_of_a_poisson_budget():
    """Lengths stop at 30 % of the words; with a mean of 3 there is about one mask for every 10 words."""
    ids, words = text(300)
    counts, hidden = [], []
    for seed in range(400):
        random = np.random.default_rng(seed)
        lengths = restoration._span_lengths(90, 3.0, np.random.default_rng(seed))
        assert lengths.sum() == 90
        filled = infill(ids, words, MASK, 0.3, random)
        counts.append((lengths == 0).mean())
        hidden.append(300 - (filled >= 10).sum())
        assert (filled[0], filled[-1]) == (0, 2) and np.all(np.diff(filled[filled >= 10]) > 0)
        assert (filled == MASK).sum() <= len(lengths)
    assert abs(np.mean(counts) - np.exp(-3)) < 0.01
    assert 60 < np.mean(hidden) < max(hidden) <= 90  # overlapping spans hide fewer


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_a_text_without_words_stays(probability):
    ids, words = text(0)
    assert infill(ids, words, MASK, probability, np.random.default_rng(0)).tolist() == [0, 2]
    assert rotate(words, np.random.default_rng(0)).tolist() == [0, 1]
    assert permute_sentences(words, np.random.default_rng(0)).tolist() == [0, 1]


def test_sentences_are_permuted_whole_and_every_order_is_equally_likely():
    sentences = np.asarray([-1, 0, 0, 1, 1, 1, 2, -1])
    parts = {0: [1, 2], 1: [3, 4, 5], 2: [6]}
    counts = {}
    for seed in range(3000):
        order = permute_sentences(sentences, np.random.default_rng(seed)).tolist()
        assert (order[0], order[-1]) == (0, 7)
        named = tuple(dict.fromkeys(int(sentences[one]) for one in order[1:-1]))
        assert order[1:-1] == [place for one in named for place in parts[one]]
        counts[named] = counts.get(named, 0) + 1
    assert len(counts) == 6
    assert all(abs(count / 3000 - 1 / 6) < 4 * np.sqrt(5 / 36 / 3000) for count in counts.values())


def test_a_text_is_rotated_to_begin_anywhere():
    words = np.asarray([-1, 0, 1, 1, 2, -1])
    found = [tuple(rotate(words, np.random.default_rng(seed))) for seed in range(2000)]
    assert set(found) == {(0, 1, 2, 3, 4, 5), (0, 2, 3, 4, 1, 5), (0, 3, 4, 1, 2, 5), (0, 4, 1, 2, 3, 5)}
    assert min(found.count(one) for one in set(found)) > 400
