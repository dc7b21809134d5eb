"""Which tokens of a picture are hidden: regions or patches."""

import numpy as np

from engine.corruption.words import one_at_least


def choose_regions(count: int, probability: float, random: np.random.Generator) -> np.ndarray:
    """Positions of the regions, of `count`, that are masked: each with the probability, one at least."""
    return np.flatnonzero(one_at_least(random.random(count) < probability, random))


def keep_patches(count: int, hidden: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(kept, hidden) positions, ascending, after MAE: the patches with the least of `count` random numbers are kept."""
    kept = int(count * (1 - hidden))
    order = np.argsort(random.random(count))
    return np.sort(order[:kept]), np.sort(order[kept:])
