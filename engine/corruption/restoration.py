"""The five noises of BART, of which a decoder restores the text: masks, deletion, infilling, permutation, rotation.

Released models use infilling of 30 % of the words and permutation of all sentences.
"""

import math

import numpy as np

from engine.corruption.words import masked, starts_word


def mask_tokens(
    ids: np.ndarray, words: np.ndarray, mask_id: int, probability: float, random: np.random.Generator
) -> np.ndarray:
    return masked(ids, np.flatnonzero(_drawn(words, probability, random)), mask_id)


def delete_tokens(
    ids: np.ndarray, words: np.ndarray, probability: float, random: np.random.Generator
) -> np.ndarray:
    return ids[~_drawn(words, probability, random)]


def _drawn(words: np.ndarray, probability: float, random: np.random.Generator) -> np.ndarray:
    return (random.random(len(words)) < probability) & (words >= 0)


def infill(
    ids: np.ndarray,
    words: np.ndarray,
    mask_id: int,
    probability: float,
    random: np.random.Generator,
    mean_span: float = 3.0,
) -> np.ndarray:
    """Spans of words become one mask each, their lengths Poisson; one of length 0 is a mask put in between.

    Lengths are drawn until they reach the share of the words, rounded up, which cuts the last one. Every span begins
    with another word; one that runs into the next takes its mask with it. `ids` begins and ends with a special token.
    """
    starts = np.flatnonzero(starts_word(words))
    lengths = _span_lengths(math.ceil(len(starts) * probability), mean_span, random)
    spans = lengths[lengths > 0]
    first = random.permutation(len(starts))[: len(spans)]
    stops = np.append(starts, len(words) - 1)[np.minimum(first + spans, len(starts))]
    gone = np.zeros(len(ids), dtype=bool)
    for start, stop in zip(starts[first].tolist(), stops.tolist(), strict=True):
        gone[start + 1 : stop] = True
    left = masked(ids, starts[first], mask_id)[~gone | (words < 0)]
    return _insert(left, len(lengths) - len(spans), mask_id, random)


def _span_lengths(budget: int, mean: float, random: np.random.Generator) -> np.ndarray:
    lengths = np.zeros(0, dtype=np.int64)
    while lengths.sum() < budget:
        lengths = np.concatenate([lengths, random.poisson(mean, size=budget)])
    if budget:
        sums = np.cumsum(lengths)
        last = int(np.searchsorted(sums, budget))
        lengths = lengths[: last + 1]
        lengths[last] -= sums[last] - budget
    return lengths


def _insert(ids: np.ndarray, count: int, mask_id: int, random: np.random.Generator) -> np.ndarray:
    """`count` masks anywhere between the first and the last token, every arrangement equally likely."""
    inner = len(ids) - 2 + count
    places = random.permutation(inner)[:count] + 1
    kept = np.ones(inner + 2, dtype=bool)
    kept[places] = False
    result = np.full(inner + 2, mask_id, dtype=ids.dtype)
    result[kept] = ids
    return result


def sentences_of(ids: np.ndarray, words: np.ndarray, full_stop: int | None) -> np.ndarray:
    """int [T]: the sentence of each token, specials -1. The first of some full stops in a row ends one.

    >>> sentences_of(np.asarray([1, 8, 5, 5, 9, 5, 2]), np.asarray([-1, 0, 1, 2, 3, 4, -1]), 5).tolist()
    [-1, 0, 0, 1, 1, 1, -1]
    """
    stops = (ids == full_stop) & (words >= 0)
    ends = stops & ~np.roll(stops, 1)
    return np.where(words >= 0, np.cumsum(ends) - ends, -1)


def permute_sentences(sentences: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """int [T]: where each token is taken from. `sentences`: the sentence of each, ascending; specials (-1) stay.

    >>> permute_sentences(np.asarray([-1, 0, 0, 1, 2, -1]), np.random.default_rng(3)).tolist()
    [0, 4, 3, 1, 2, 5]
    """
    inner = np.flatnonzero(sentences >= 0)
    found, member = np.unique(sentences[inner], return_inverse=True)
    order = np.arange(len(sentences))
    order[inner] = inner[np.argsort(random.permutation(found.size)[member], kind="stable")]
    return order


def rotate(words: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """int [T]: where each token is taken from, so that the text begins with a token drawn; specials (-1) stay."""
    inner = np.flatnonzero(words >= 0)
    order = np.arange(len(words))
    if inner.size:
        order[inner] = np.roll(inner, -int(random.integers(inner.size)))
    return order
