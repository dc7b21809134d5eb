"""The order of a run and its random choices: pure functions of (seed, epoch, record).

So the data position of a run is one integer.
"""

from enum import IntEnum

import numpy as np

_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's finaliser


class Purpose(IntEnum):
    """What a random choice is for; each has its own stream. The numbers are part of every run's result."""

    ORDER = 0
    CAPTION = 1
    IMAGE = 2
    MASK = 3
    REPLACEMENT = 4
    PERMUTED_CAPTIONS = 5
    SCENES = 6


def generator(seed: int, epoch: int, record: int, purpose: Purpose) -> np.random.Generator:
    """The Philox generator of one choice. Draws advance the counter's low word, so no two overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, epoch, record]))


class Permutation:
    """A bijection of 0 .. size-1, evaluated where it is asked for: a Feistel network with cycle walking."""

    def __init__(self, size: int, seed: int, epoch: int, purpose: Purpose) -> None:
        self.size = size
        self.half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self.half_mask = np.uint64((1 << int(self.half_bits)) - 1)
        self.keys = generator(seed, epoch, 0, purpose).bit_generator.random_raw(_ROUNDS)

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


class BatchPlan:
    """Which record comes at which position of the endless stream: position p is place p % n of epoch p // n.

    >>> plan = BatchPlan(num_records=5, seed=0)
    >>> sorted(record for epoch, record in plan.records(5, 5))
    [0, 1, 2, 3, 4]
    >>> plan.records(3, 4) == plan.records(0, 7)[3:]
    True
    """

    def __init__(self, num_records: int, seed: int) -> None:
        if num_records < 1:
            raise ValueError(f"num_records must be at least 1, got {num_records}")
        self.num_records = num_records
        self.seed = seed

    def records(self, position: int, count: int) -> list[tuple[int, int]]:
        """(epoch, record index) of `count` consecutive positions."""
        found: list[tuple[int, int]] = []
        while len(found) < count:
            epoch, offset = divmod(position + len(found), self.num_records)
            offsets = np.arange(offset, min(self.num_records, offset + count - len(found)))
            permutation = Permutation(self.num_records, self.seed, epoch, Purpose.ORDER)
            found += [(epoch, int(record)) for record in permutation(offsets)]
        return found

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """(epoch, record index) that stands in for a broken record at `position`."""
        draw = generator(self.seed, attempt, position, Purpose.REPLACEMENT).bit_generator.random_raw()
        return position // self.num_records, int(draw % self.num_records)
