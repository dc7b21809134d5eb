"""Pairs of segments after BERT (is the second one next?) and ALBERT (are they in order?).

A chunk is the sentences, as arrays of ids, that fill one example.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SentencePair:
    """Two segments without special tokens."""

    first: np.ndarray
    second: np.ndarray
    label: int
    """0: as in the document; 1: the second segment is another document's (BERT), or both are swapped (ALBERT)."""


def next_sentence(
    chunk: Sequence[np.ndarray], other: Sequence[np.ndarray], limit: int, random: np.random.Generator
) -> SentencePair:
    """A chunk cut in two between sentences, or, half the time, with sentences of another document behind the cut.

    `limit` tokens in all. A chunk of one sentence has nothing to go on with: it always meets the other document.
    """
    cut = _cut(chunk, random)
    replaced = len(chunk) == 1 or random.random() < 0.5
    first = np.concatenate(chunk[:cut])
    if not replaced:
        return SentencePair(*truncate(first, np.concatenate(chunk[cut:]), limit, random), label=0)
    room = np.cumsum([len(sentence) for sentence in other]) < limit - len(first)
    needed = other[: int(room.sum()) + 1]
    return SentencePair(*truncate(first, np.concatenate(needed), limit, random), label=1)


def sentence_order(chunk: Sequence[np.ndarray], limit: int, random: np.random.Generator) -> SentencePair:
    """A chunk of two sentences or more cut in two between sentences; half the time the later part comes first."""
    assert len(chunk) > 1, "one sentence has no order"
    cut = _cut(chunk, random)
    parts = [np.concatenate(chunk[:cut]), np.concatenate(chunk[cut:])]
    swapped = random.random() < 0.5
    return SentencePair(*truncate(*(parts[::-1] if swapped else parts), limit, random), label=int(swapped))


def _cut(chunk: Sequence[np.ndarray], random: np.random.Generator) -> int:
    return 1 if len(chunk) == 1 else int(random.integers(1, len(chunk)))


def truncate(
    first: np.ndarray, second: np.ndarray, limit: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`limit` tokens in all: one after another is taken from the longer segment, at either end with even odds."""
    lengths = _shares(len(first), len(second), limit)
    kept = []
    for segment, length in zip((first, second), lengths, strict=True):
        front = int(random.binomial(len(segment) - length, 0.5))
        kept.append(segment[front : front + length])
    return kept[0], kept[1]


def _shares(first: int, second: int, limit: int) -> tuple[int, int]:
    """What is left of two lengths when the longer one, of equal ones the second, loses until both fit."""
    half = limit // 2
    if first + second <= limit:
        return first, second
    if first <= limit - half:
        return first, limit - first
    return (limit - second, second) if second <= half else (limit - half, half)
