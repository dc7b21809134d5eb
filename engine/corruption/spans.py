"""Masked spans after SpanBERT: whole words in a row, their number geometric, one fate for all tokens of a span."""

import math
from dataclasses import dataclass

import numpy as np

from engine.corruption.words import Vocabulary, hide, starts_word

SUCCESS = 0.2
LONGEST = 10


@dataclass(frozen=True)
class MaskedSpans:
    """A text with hidden spans. `selected`, `left`, `right`, `offsets` have one entry per hidden token."""

    ids: np.ndarray
    selected: np.ndarray
    """Positions of the hidden tokens, ascending."""
    left: np.ndarray
    """Position of the token before the span, which is never hidden."""
    right: np.ndarray
    """Position of the token behind it."""
    offsets: np.ndarray
    """Place within the span, from 0."""


def mask_spans(
    ids: np.ndarray,
    words: np.ndarray,
    vocabulary: Vocabulary,
    probability: float,
    random: np.random.Generator,
) -> MaskedSpans:
    """`ids` begins and ends with a special token, so that every span has both neighbours."""
    assert words[0] < 0 and words[-1] < 0, "spans need a neighbour on either side"
    hidden = choose_spans(words, probability, random)
    starts, stops = runs(hidden)
    selected = np.flatnonzero(hidden)
    span = np.repeat(np.arange(len(starts)), stops - starts)
    corrupted = hide(ids, selected, random.random(len(starts))[span], vocabulary, random)
    return MaskedSpans(corrupted, selected, starts[span] - 1, stops[span], selected - starts[span])


def choose_spans(words: np.ndarray, probability: float, random: np.random.Generator) -> np.ndarray:
    """bool [T]: hidden tokens. Spans are drawn until the share, rounded up, is reached; there the last one is cut.

    A span begins with the word of a token that is not hidden yet. It ends before a special token.
    """
    candidates = np.flatnonzero(words >= 0)
    budget = math.ceil(candidates.size * probability)
    starts = np.flatnonzero(starts_word(words) | (words < 0))
    lengths = np.arange(1, LONGEST + 1)
    shares = SUCCESS * (1 - SUCCESS) ** (lengths - 1)
    shares /= shares.sum()
    hidden = np.zeros(len(words), dtype=bool)
    while (left := budget - int(hidden.sum())) > 0:
        count = random.choice(lengths, p=shares)
        anchor = candidates[random.integers(candidates.size)]
        if hidden[anchor]:
            continue
        first = int(np.searchsorted(starts, anchor, side="right")) - 1
        ends = starts[first + 1 : first + 1 + count]
        special = np.flatnonzero(words[ends] < 0)
        stop = ends[special[0]] if special.size else (ends[-1] if len(ends) == count else len(words))
        fresh = np.flatnonzero(~hidden[starts[first] : stop])[:left]
        hidden[starts[first] + fresh] = True
    return hidden


def runs(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, stops) of the runs of True.

    >>> runs(np.asarray([False, True, True, False, True]))
    (array([1, 4]), array([3, 5]))
    """
    edges = np.diff(chosen.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
