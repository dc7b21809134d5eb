"""What is hidden: words (of the selected 80 % become [MASK], 10 % another token, 10 % stay) and regions."""

from typing import Literal

import numpy as np

from engine.data.tokenization import Tokenizer

_MASKED, _REPLACED = 0.8, 0.9  # shares of the selected tokens: below the first, below the second, the rest


def corrupt(
    ids: np.ndarray,
    words: np.ndarray,
    tokenizer: Tokenizer,
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
        return _all_masked(ids, candidates[units == 0], tokenizer)
    selected = candidates[_one_at_least(taken, random)[units]]
    fate = random.random(selected.size)
    replacement = tokenizer.ordinary_ids[random.integers(tokenizer.ordinary_ids.size, size=selected.size)]
    corrupted = ids.copy()
    corrupted[selected[fate < _MASKED]] = tokenizer.mask_id
    replaced = (fate >= _MASKED) & (fate < _REPLACED)
    corrupted[selected[replaced]] = replacement[replaced]
    return corrupted, selected


def choose_regions(count: int, probability: float, random: np.random.Generator) -> np.ndarray:
    """Positions of the regions, of `count`, that are masked: each with the probability, one at least."""
    return np.flatnonzero(_one_at_least(random.random(count) < probability, random))


def _one_at_least(taken: np.ndarray, random: np.random.Generator) -> np.ndarray:
    if not taken.any():
        taken[random.integers(taken.size)] = True
    return taken


def _all_masked(ids: np.ndarray, selected: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    corrupted = ids.copy()
    corrupted[selected] = tokenizer.mask_id
    return corrupted, selected
