"""The order of a run and its random choices: pure functions of (seed, epoch, example).

So the data position of a run is one integer.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Generic, TypeVar

import numpy as np

_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's finaliser
_KEPT_EPOCHS = 2  # a step may end one epoch and begin the next

Result = TypeVar("Result")


class Purpose(IntEnum):
    """What a random choice is for; each has its own numbers. They are part of every run's result."""

    ORDER = 0
    CAPTION = 1
    IMAGE = 2
    MASK = 3
    REPLACEMENT = 4
    PERMUTED_CAPTIONS = 5
    SCENES = 6
    TASK = 7
    BATCHES = 8
    REGIONS = 9
    PICTURE = 10
    PICTURE_REPLACEMENT = 11
    PAGES = 12
    AUGMENTATION = 13
    SEGMENTS = 14


def generator(seed: int, epoch: int, example: int, purpose: Purpose, stream: int = 0) -> np.random.Generator:
    """The Philox generator of one choice. Draws advance the counter's low word, so no two overlap.

    `stream` numbers the tasks of all sets, which meet the same example in the same of their epochs.
    """
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, stream, epoch, example]))


class Permutation:
    """A bijection of 0 .. size-1, evaluated where it is asked for: a Feistel network with cycle walking."""

    def __init__(self, size: int, seed: int, epoch: int, purpose: Purpose, stream: int = 0) -> None:
        self.size = size
        self.half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self.half_mask = np.uint64((1 << int(self.half_bits)) - 1)
        self.keys = generator(seed, epoch, 0, purpose, stream).bit_generator.random_raw(_ROUNDS)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        values = self._network(np.asarray(indices, dtype=np.uint64))
        # the network permutes a power of four; a cycle that starts inside 0 .. size-1 comes back inside
        while (outside := values >= self.size).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half_bits, values & self.half_mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right + key) & self.half_mask)
        return (left << self.half_bits) | right


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIERS[0]
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIERS[1]
    return words ^ (words >> np.uint64(31))


class OfEpoch(Generic[Result]):
    """A function of the epoch that keeps its latest results."""

    def __init__(self, function: Callable[[int], Result]) -> None:
        self.function = function
        self.results: dict[int, Result] = {}

    def __call__(self, epoch: int) -> Result:
        if epoch not in self.results:
            while len(self.results) >= _KEPT_EPOCHS:
                del self.results[next(iter(self.results))]
            self.results[epoch] = self.function(epoch)
        return self.results[epoch]


class Plan:
    """An endless stream of units of examples; every epoch has each example once.

    Positions count units: single pairs, or bucketed batches. `stream` tells plans of one run apart.
    """

    def __init__(self, num_examples: int, seed: int, stream: int = 0) -> None:
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        self.num_examples = num_examples
        self.seed = seed
        self.stream = stream

    def examples(self, position: int, count: int) -> list[tuple[int, int]]:
        """(epoch, example) of all of `count` consecutive units."""
        raise NotImplementedError

    def examples_before(self, position: int) -> int:
        """Number of examples in all units before `position`: the place of its first one in the stream."""
        raise NotImplementedError

    def replacement(self, place: int, attempt: int) -> tuple[int, int]:
        """(epoch, example) that stands in for a broken one, the example number `place` of the stream."""
        random = generator(self.seed, attempt, place, Purpose.REPLACEMENT, self.stream).bit_generator
        return place // self.num_examples, int(random.random_raw() % self.num_examples)


class PairPlan(Plan):
    """Units of one pair: position p is place p % n of the permutation of epoch p // n.

    >>> plan = PairPlan(num_examples=5, seed=0)
    >>> sorted(example for epoch, example in plan.examples(5, 5))
    [0, 1, 2, 3, 4]
    >>> plan.examples(3, 4) == plan.examples(0, 7)[3:]
    True
    """

    def examples(self, position: int, count: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        while len(found) < count:
            epoch, offset = divmod(position + len(found), self.num_examples)
            offsets = np.arange(offset, min(self.num_examples, offset + count - len(found)))
            permutation = Permutation(self.num_examples, self.seed, epoch, Purpose.ORDER, self.stream)
            found += [(epoch, example) for example in permutation(offsets).tolist()]
        return found

    def examples_before(self, position: int) -> int:
        return position
