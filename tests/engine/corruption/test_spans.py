"""SpanBERT's spans: lengths, the budget, one fate each, neighbours for the boundary objective."""

import numpy as np

from engine.corruption import spans
from engine.corruption.spans import LONGEST, choose_spans, mask_spans, runs


class Letters:
    mask_id = 1
    ordinary_ids = np.arange(100, 200)


def text(words, pieces=1):
    """`words` words of `pieces` tokens between special tokens."""
    numbers = np.repeat(np.arange(words), pieces)
    return np.concatenate([[-1], numbers, [-1]])


def test_spans_have_a_geometric_number_of_words():
    """Cut at 10 and scaled to 1."""
    lengths = []
    for seed in range(300):
        random = Recorder(seed)
        hidden = choose_spans(text(1000), 0.15, random)
        start, length = 1 + random.anchors[0], random.lengths[0]
        assert hidden[start : min(start + length, 1001)].all() and hidden.sum() == 150
        lengths += random.lengths
    shares = 0.2 * 0.8 ** np.arange(10)
    shares /= shares.sum()
    counts = np.bincount(lengths, minlength=11)[1:] / len(lengths)
    assert (np.abs(counts - shares) < 4 * np.sqrt(shares / len(lengths))).all()
    assert abs(np.mean(lengths) - 3.8) < 0.02  # as the paper says


class Recorder:
    """A generator that remembers what it drew."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.lengths, self.anchors = [], []

    def choice(self, values, p):
        self.lengths.append(self.random.choice(values, p=p))
        return self.lengths[-1]

    def integers(self, count):
        self.anchors.append(self.random.integers(count))
        return self.anchors[-1]


class Scripted:
    """A generator that says what it was told to."""

    def __init__(self, lengths, anchors):
        self.lengths, self.anchors = iter(lengths), iter(anchors)

    def choice(self, values, p):
        assert values.tolist() == list(range(1, LONGEST + 1)) and abs(p.sum() - 1) < 1e-12
        return next(self.lengths)

    def integers(self, count):
        return next(self.anchors)


def test_spans_are_whole_words_until_the_budget_cuts_the_last():
    """30 words of 2 tokens: the budget is 9. A span of 2 words begins with the word of token 5, one of 3 at token 20."""
    hidden = choose_spans(text(30, 2), 0.15, Scripted([2, 4, 3], [5, 7, 21]))
    # words 2 and 3 are tokens 5..8; the second anchor is hidden already; word 10 begins at token 21
    assert np.flatnonzero(hidden).tolist() == [5, 6, 7, 8, 21, 22, 23, 24, 25]


def test_a_span_ends_before_a_special_token_and_hidden_tokens_cost_nothing():
    words = np.asarray([-1, 0, 1, 2, -1, 3, 4, 5, -1])
    hidden = choose_spans(words, 0.6, Scripted([10, 2, 9], [1, 3, 0]))
    # candidates are 1 2 3 5 6 7: from 2 to the separator, then 5 and 6: the budget of 4 is reached
    assert np.flatnonzero(hidden).tolist() == [2, 3, 5, 6]
    assert not choose_spans(np.asarray([-1, -1]), 0.15, np.random.default_rng(0)).any()


def test_a_span_has_one_fate_and_knows_its_neighbours():
    words = text(4000)
    ids = np.concatenate([[0], np.resize(np.arange(10, 90), 4000), [2]])
    found = mask_spans(ids, words, Letters, 0.15, np.random.default_rng(3))
    hidden = np.zeros(len(ids), dtype=bool)
    hidden[found.selected] = True
    assert hidden.sum() == 600 and np.array_equal(found.ids[~hidden], ids[~hidden])
    fates = {"masked": 0, "replaced": 0, "kept": 0}
    for start, stop in zip(*runs(hidden), strict=True):
        inside = found.selected.searchsorted([start, stop])
        part = slice(*inside)
        assert (found.left[part] == start - 1).all() and (found.right[part] == stop).all()
        assert found.offsets[part].tolist() == list(range(stop - start))
        after = found.ids[start:stop]
        fate = "masked" if (after == 1).all() else "kept" if (after == ids[start:stop]).all() else "replaced"
        assert fate != "replaced" or (after >= 100).all()
        fates[fate] += 1
    total = sum(fates.values())
    assert not hidden[found.left].any() and not hidden[found.right].any()
    for fate, share in (("masked", 0.8), ("replaced", 0.1), ("kept", 0.1)):
        assert abs(fates[fate] / total - share) < 4 * np.sqrt(share * (1 - share) / total)


def test_the_share_is_of_words_not_of_special_tokens():
    for tokens in (1, 7, 20, 21):
        hidden = choose_spans(text(tokens), 0.15, np.random.default_rng(0))
        assert hidden.sum() == -(-tokens * 15 // 100)
    assert spans.SUCCESS == 0.2
