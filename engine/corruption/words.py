"""Masked words after BERT: of the selected tokens 80 % become [MASK], 10 % another token, 10 % stay."""

from typing import Literal, Protocol

import numpy as np

_MASKED, _REPLACED = 0.8, 0.9  # shares of the selected tokens: below the first, below the second, the rest


class Vocabulary(Protocol):
    """What corruption asks of a tokenizer."""

    mask_id: int
    ordinary_ids: np.ndarray
    """The ids of everything but special tokens."""


def corrupt(
    ids: np.ndarray,
    words: np.ndarray,
    vocabulary: Vocabulary,
    probability: float,
    whole_word: bool,
    random: np.random.Generator,
    when_none: Literal["any", "first"] = "any",
) -> tuple[np.ndarray, np.ndarray]:
    """(corrupted ids, selected positions). Words below 0 are special tokens; one other is always selected."""
    candidates = np.flatnonzero(words >= 0)
    if candidates.size == 0:
        return ids.copy(), candidates
    distinct, units = np.unique(words[candidates] if whole_word else candidates, return_inverse=True)
    taken = random.random(distinct.size) < probability
    if not taken.any() and when_none == "first":
        selected = candidates[units == 0]
        return masked(ids, selected, vocabulary.mask_id), selected
    selected = candidates[one_at_least(taken, random)[units]]
    return hide(ids, selected, random.random(selected.size), vocabulary, random), selected


def hide(
    ids: np.ndarray,
    selected: np.ndarray,
    fate: np.ndarray,
    vocabulary: Vocabulary,
    random: np.random.Generator,
) -> np.ndarray:
    """The ids with those at `selected` masked, replaced or kept, as `fate`, a number in [0, 1) for each, has it."""
    ordinary = vocabulary.ordinary_ids
    replacement = ordinary[random.integers(ordinary.size, size=selected.size)]
    corrupted = masked(ids, selected[fate < _MASKED], vocabulary.mask_id)
    replaced = (fate >= _MASKED) & (fate < _REPLACED)
    corrupted[selected[replaced]] = replacement[replaced]
    return corrupted


def masked(ids: np.ndarray, selected: np.ndarray, mask_id: int) -> np.ndarray:
    corrupted = ids.copy()
    corrupted[selected] = mask_id
    return corrupted


def one_at_least(taken: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The same with one, drawn, where nothing is taken."""
    if not taken.any():
        taken[random.integers(taken.size)] = True
    return taken


def starts_word(words: np.ndarray) -> np.ndarray:
    """bool [T]: the first token of each word. Neighbours of one word have one number, whatever the order of words."""
    return (words >= 0) & (np.diff(words, prepend=-1) != 0)
