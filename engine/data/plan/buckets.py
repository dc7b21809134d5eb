"""Batches of a token budget, of examples of like length, after UNITER's token bucket sampler.

Shuffled examples are cut into buckets, and every bucket is sorted by length, longest first. A batch takes the
next `multiple` examples of its bucket as long as the bucket's longest times their number stays in the budget.
The batches of all buckets are shuffled. As released, but for the last batch of a bucket: UNITER drops it, and
with it the bucket's shortest examples; here it is kept, so an epoch has every example once.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.data.plan.order import OfEpoch, Plan, Purpose, generator
from engine.data.records.record import DataError
from engine.sections import Buckets


@dataclass(frozen=True)
class _Epoch:
    """The batches of an epoch, in the order of the stream."""

    order: np.ndarray
    """int32 [E]: the examples, bucket after bucket, each sorted."""
    starts: np.ndarray
    """Place of each batch's first example in `order`."""
    before: np.ndarray
    """[batches + 1]: number of examples in the batches before each."""

    def batch(self, number: int) -> np.ndarray:
        start, size = self.starts[number], self.before[number + 1] - self.before[number]
        return self.order[start : start + size]


class BucketPlan(Plan):
    """Units of one bucketed batch. `lengths(epoch)`: integers [E], as draws of the epoch have made them."""

    def __init__(
        self,
        lengths: Callable[[int], np.ndarray],
        num_examples: int,
        buckets: Buckets,
        seed: int,
        stream: int = 0,
    ) -> None:
        super().__init__(num_examples, seed, stream)
        self.lengths = lengths
        self.buckets = buckets
        self.epoch = OfEpoch(self._epoch)
        self._first_batches = [0]  # of each epoch met so far, counted through the stream

    def examples(self, position: int, count: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for unit in range(position, position + count):
            epoch, batch = self._locate(unit)
            found += [(epoch, example) for example in self.epoch(epoch).batch(batch).tolist()]
        return found

    def examples_before(self, position: int) -> int:
        epoch, batch = self._locate(position)
        return epoch * self.num_examples + int(self.epoch(epoch).before[batch])

    def _locate(self, position: int) -> tuple[int, int]:
        """(epoch, batch of it): epochs have different numbers of batches."""
        firsts = self._first_batches
        while firsts[-1] <= position:
            lengths, _ = self._shuffled(len(firsts) - 1)
            firsts.append(firsts[-1] + int(self._batch_counts(lengths)[0].sum()))
        epoch = bisect_right(firsts, position) - 1
        return epoch, position - firsts[epoch]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples in random order: (lengths, examples)."""
        random = generator(self.seed, epoch, 0, Purpose.ORDER, self.stream)
        examples = random.permutation(np.arange(self.num_examples, dtype=np.int32))
        return self.lengths(epoch)[examples], examples

    def _batch_counts(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each bucket: (number of batches, examples in all but the last of them)."""
        options, total = self.buckets, len(lengths)
        firsts = np.arange(0, total, options.size)
        longest = np.maximum.reduceat(lengths, firsts)
        sizes = options.tokens // longest // options.multiple * options.multiple
        assert sizes.min() > 0, "the budget was checked against the longest example"
        return -(-np.diff(firsts, append=total) // sizes), sizes

    def _epoch(self, number: int) -> _Epoch:
        lengths, examples = self._shuffled(number)
        counts, sizes = self._batch_counts(lengths)
        bucket = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(bucket)) - (np.cumsum(counts) - counts)[bucket]
        starts = bucket * self.buckets.size + place * sizes[bucket]
        stops = np.minimum(starts + sizes[bucket], (bucket + 1) * self.buckets.size)
        stops = np.minimum(stops, self.num_examples)
        shuffle = generator(self.seed, number, 0, Purpose.BATCHES, self.stream).permutation(len(starts))
        before = np.concatenate(([0], np.cumsum((stops - starts)[shuffle])))
        return _Epoch(examples[_sorted_buckets(lengths, self.buckets.size)], starts[shuffle], before)


def _sorted_buckets(lengths: np.ndarray, size: int) -> np.ndarray:
    """Places of the examples, bucket after bucket, longest first; those of one length keep their order."""
    rows = -(-len(lengths) // size)
    narrow = np.min_scalar_type(-int(lengths.max()))  # 16 bits are sorted much faster than 32
    keys = np.full(rows * size, 1, dtype=narrow)
    keys[: len(lengths)] = -lengths.astype(narrow)
    places = np.argsort(keys.reshape(rows, size), axis=1, kind="stable") + np.arange(rows)[:, None] * size
    return places.ravel()[: len(lengths)]  # what fills the last bucket was sorted behind its examples


def check_budget(buckets: Buckets, longest: int, name: str) -> None:
    """Refuse a budget that cannot hold `multiple` examples as long as any that set `name` has."""
    needed = buckets.multiple * longest
    if needed > buckets.tokens:
        raise DataError(
            f"train.buckets.tokens must hold train.buckets.multiple = {buckets.multiple} examples of "
            f"{longest} tokens, the longest of {name}, {needed} tokens in all, got {buckets.tokens}"
        )
