"""Which of several tasks every optimizer step trains."""

from collections.abc import Sequence

import numpy as np

from engine.data.plan.order import Purpose, generator

_FIRST_STEPS = 1024


class Mixture:
    """Draws one task per optimizer step, with probabilities proportional to the ratios.

    A pure function of (seed, step): ranks agree without a word.

    >>> mixture = Mixture([2.0, 1.0], seed=0)
    >>> [mixture(step) for step in range(6)]
    [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (1, 3)]
    """

    def __init__(self, ratios: Sequence[float], seed: int) -> None:
        self.seed = seed
        self.bounds = np.cumsum(ratios) / np.sum(ratios)
        self.tasks = self.turns = np.empty(0, dtype=np.int32)

    def __call__(self, step: int) -> tuple[int, int]:
        """(task, number of earlier steps that drew it)."""
        if step >= len(self.tasks):
            self._draw(max(_FIRST_STEPS, 1 << int(step).bit_length()))
        return int(self.tasks[step]), int(self.turns[step])

    def _draw(self, steps: int) -> None:
        """The first `steps` steps anew: a longer draw begins like a shorter one."""
        draws = generator(self.seed, 0, 0, Purpose.TASK).random(steps)
        last = len(self.bounds) - 1  # the last bound may be rounded to less than 1
        self.tasks = np.minimum(np.searchsorted(self.bounds, draws, side="right"), last).astype(np.int32)
        self.turns = np.empty_like(self.tasks)
        for task in range(len(self.bounds)):
            drawn = self.tasks == task
            self.turns[drawn] = np.arange(np.count_nonzero(drawn))
