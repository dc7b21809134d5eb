"""Masked-language corruption: its shares, what it never touches, whole words."""

import numpy as np
import pytest

from engine.corruption.words import corrupt, starts_word
from engine.data import train_tokenizer
from engine.data.plan.order import Purpose, generator

TOKENIZER = train_tokenizer(
    ["a quick brown fox jumps over the lazy dog again and again"] * 3, "wordpiece", 80, True
)


def sentence(tokens, pieces_per_word=1):
    """`tokens` ids between special tokens; the ids name their places in turn."""
    ids = np.resize(TOKENIZER.ordinary_ids, tokens)
    words = np.arange(tokens) // pieces_per_word
    return np.asarray([1, *ids, 2]), np.asarray([-1, *words, -1])


def test_shares_of_the_selection_and_of_its_fates():
    """Each share within 4 standard deviations, over 200,000 tokens."""
    ids, words = sentence(200_000)
    corrupted, selected = corrupt(ids, words, TOKENIZER, 0.15, False, generator(0, 0, 0, Purpose.MASK))
    assert abs(len(selected) / 200_000 - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 200_000)
    before, after = ids[selected], corrupted[selected]
    masked = after == TOKENIZER.mask_id
    changed = ~masked & (after != before)
    kept_by_chance = 0.1 / TOKENIZER.ordinary_ids.size
    for found, share in (
        (masked, 0.8),
        (changed, 0.1 - kept_by_chance),
        (after == before, 0.1 + kept_by_chance),
    ):
        assert abs(found.mean() - share) < 4 * np.sqrt(share * (1 - share) / len(selected))
    assert set(after[changed]) == set(TOKENIZER.ordinary_ids)
    untouched = np.setdiff1d(np.arange(len(ids)), selected)
    assert np.array_equal(ids[untouched], corrupted[untouched])


@pytest.mark.parametrize("whole_word", [False, True])
def test_something_is_always_selected_and_never_a_special_token(whole_word):
    chosen = []
    for record in range(300):
        ids, words = sentence(3)
        corrupted, selected = corrupt(
            ids, words, TOKENIZER, 0.15, whole_word, generator(0, 0, record, Purpose.MASK)
        )
        assert len(selected) >= 1 and {0, 4}.isdisjoint(selected)
        assert (corrupted[0], corrupted[4]) == (1, 2)
        chosen += selected.tolist()
    assert np.bincount(chosen)[1:].min() > 80


def test_a_caption_without_words_is_left_alone():
    ids, words = sentence(0)
    corrupted, selected = corrupt(ids, words, TOKENIZER, 0.15, False, generator(0, 0, 0, Purpose.MASK))
    assert len(selected) == 0 and corrupted.tolist() == [1, 2]


def test_whole_words_are_selected_together():
    ids, words = sentence(30_000, pieces_per_word=3)
    _, selected = corrupt(ids, words, TOKENIZER, 0.15, True, generator(0, 0, 0, Purpose.MASK))
    assert set(np.bincount(words[selected])) == {0, 3}
    assert abs(len(selected) / 30_000 - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 10_000)


def test_corruption_depends_on_seed_epoch_and_record_alone():
    ids, words = sentence(200)

    def drawn(*key):
        return corrupt(ids, words, TOKENIZER, 0.15, False, generator(*key, Purpose.MASK))[0].tolist()

    results = [drawn(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert results == [drawn(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({tuple(result) for result in results}) == 4


@pytest.mark.parametrize("whole_word", [False, True])
def test_where_the_draw_selects_nothing_the_first_token_can_be_masked(whole_word):
    """UNITER's rule: an empty draw, 0.85^n of them, masks the first unit always; others are as they were."""
    ids, words = sentence(6, pieces_per_word=2)
    units, first = (3, [1, 2]) if whole_word else (6, [1])
    empty = 0
    for record in range(4000):

        def drawn(when_none):
            random = generator(0, 0, record, Purpose.MASK)
            return corrupt(ids, words, TOKENIZER, 0.15, whole_word, random, when_none)

        (corrupted, selected), (other, positions) = drawn("first"), drawn("any")
        nothing = (generator(0, 0, record, Purpose.MASK).random(units) >= 0.15).all()
        empty += nothing
        if nothing:
            assert selected.tolist() == first and (corrupted[first] == TOKENIZER.mask_id).all()
            assert np.array_equal(np.delete(corrupted, first), np.delete(ids, first))
        else:
            assert np.array_equal(corrupted, other) and np.array_equal(selected, positions)
    share = 0.85**units
    assert abs(empty / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000)


def test_words_start_where_their_number_changes_in_whatever_order_they_stand():
    words = np.asarray([-1, 2, 2, 0, 1, 1, -1, 1, -1])
    assert np.flatnonzero(starts_word(words)).tolist() == [1, 3, 4, 7]
