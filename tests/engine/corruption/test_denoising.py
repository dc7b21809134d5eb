"""T5: noise in spans, sentinels on both sides, prefixes."""

from collections import Counter

import numpy as np
import pytest

from engine.corruption.denoising import corrupt_spans, noise_mask, prefix_length
from engine.corruption.spans import runs

SENTINELS = np.arange(999, 899, -1)


@pytest.mark.parametrize("length, noise, spans", [(1, 0, 0), (2, 1, 1), (10, 2, 1), (20, 3, 1), (100, 15, 5), (512, 77, 26)])
def test_tokens_and_spans_are_as_many_as_the_shares_say(length, noise, spans):
    for seed in range(20):
        mask = noise_mask(length, 0.15, 3.0, np.random.default_rng(seed))
        assert len(mask) == length and mask.sum() == noise and len(runs(mask)[0]) == spans
        if length > 1:
            assert not mask[0] and mask[-1]


def test_every_division_is_equally_likely():
    """12 tokens, half of them noise in 2 spans: 5 ways to cut the noise times 5 to cut the rest."""
    drawn = Counter(tuple(noise_mask(12, 0.5, 3.0, np.random.default_rng(seed))) for seed in range(5000))
    assert len(drawn) == 25
    assert all(abs(count / 5000 - 1 / 25) < 4 * np.sqrt(0.04 * 0.96 / 5000) for count in drawn.values())


def test_inputs_have_sentinels_for_spans_and_targets_for_the_rest():
    class Fixed:
        """Cuts 6 noise tokens after 2 of them and 6 others after 3."""

        def __init__(self):
            self.orders = iter([[1, 0, 2, 3, 4], [2, 0, 1, 3, 4]])

        def permutation(self, count):
            return np.asarray(next(self.orders))

    inputs, targets = corrupt_spans(np.arange(1, 13), SENTINELS, 0, Fixed(), density=0.5)
    # kept 3, noise 2, kept 3, noise 4
    assert inputs.tolist() == [1, 2, 3, 999, 6, 7, 8, 998, 0]
    assert targets.tolist() == [999, 4, 5, 998, 9, 10, 11, 12, 0]


def test_inputs_and_targets_together_are_the_text():
    for seed in range(50):
        ids = np.arange(1, 301)
        inputs, targets = corrupt_spans(ids, SENTINELS, 0, np.random.default_rng(seed))
        parts = {int(part[0]): part[1:] for part in np.split(targets[:-1], np.flatnonzero(targets[:-1] >= 900))[1:]}
        whole = [token for one in inputs[:-1].tolist() for token in (parts[one] if one >= 900 else [one])]
        assert whole == ids.tolist()
        assert (inputs[-1], targets[-1]) == (0, 0) and len(parts) == 15


def test_a_tokenizer_needs_enough_sentinels():
    with pytest.raises(ValueError, match="5 spans need as many sentinels, the tokenizer has 4"):
        corrupt_spans(np.arange(100), SENTINELS[:4], 0, np.random.default_rng(0))


@pytest.mark.parametrize("least", [0, 1])
def test_a_prefix_has_every_length_that_leaves_something_to_predict(least):
    drawn = np.bincount([prefix_length(8, np.random.default_rng(seed), least) for seed in range(8000)], minlength=8)
    assert drawn[:least].sum() == 0 and len(drawn) == 8
    share = 1 / (8 - least)
    assert (np.abs(drawn[least:] / 8000 - share) < 4 * np.sqrt(share / 8000)).all()
    assert prefix_length(1, np.random.default_rng(0), least) == 0
