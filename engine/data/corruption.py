"""Masked-language corruption: of the selected tokens 80 % become [MASK], 10 % another token, 10 % stay."""

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
) -> tuple[np.ndarray, np.ndarray]:
    """(corrupted ids, selected positions). Words below 0 are special tokens; one other is always selected."""
    candidates = np.flatnonzero(words >= 0)
    if candidates.size == 0:
        return ids.copy(), candidates
    selected = candidates[_select(words[candidates] if whole_word else candidates, probability, random)]
    fate = random.random(selected.size)
    replacement = tokenizer.ordinary_ids[random.integers(tokenizer.ordinary_ids.size, size=selected.size)]
    corrupted = ids.copy()
    corrupted[selected[fate < _MASKED]] = tokenizer.mask_id
    replaced = (fate >= _MASKED) & (fate < _REPLACED)
    corrupted[selected[replaced]] = replacement[replaced]
    return corrupted, selected


def _select(units: np.ndarray, probability: float, random: np.random.Generator) -> np.ndarray:
    """Which candidates are taken, drawn per distinct unit (a token, or a word); one unit if none was."""
    distinct, unit_of = np.unique(units, return_inverse=True)
    taken = random.random(distinct.size) < probability
    if not taken.any():
        taken[random.integers(distinct.size)] = True
    return taken[unit_of]
