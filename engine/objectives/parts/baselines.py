"""The best that can be predicted without looking at the pair: what a figure is worth is seen beside it.

All know the held-out targets themselves, so no constant does better.
"""

from __future__ import annotations

import torch
from torch import Tensor


class MeanRegion:
    """The mean of all targets, predicted for each."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, targets: Tensor) -> None:
        """`targets` `[M, F]`."""
        values = targets.double()
        self.count += len(values)
        self.sums = self.sums + values.sum(0)
        self.squares = self.squares + values.square().sum(0)

    @property
    def squared_error(self) -> float:
        """Mean over all elements."""
        return (self.squares / self.count - (self.sums / self.count).square()).mean().item()


class ClassPrior:
    """The mean of all distributions over classes, predicted for each."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | float = 0.0
        self.negative_entropy: Tensor | float = 0.0

    def add(self, labels: Tensor) -> None:
        """`labels` `[M, C]`: distributions, or rows that are 1 at one class."""
        labels = labels.double()
        self.count += len(labels)
        self.sums = self.sums + labels.sum(0)
        self.negative_entropy = self.negative_entropy + torch.xlogy(labels, labels).sum()

    @property
    def divergence(self) -> float:
        """KL(label || prior), mean over the labels; of rows with a single 1 it is their cross-entropy."""
        cross = torch.xlogy(self.sums, self.sums / self.count).sum()
        return (self.negative_entropy - cross).item() / self.count

    @property
    def largest_share(self) -> float:
        """Accuracy of always naming the most frequent class."""
        return self.sums.max().item() / self.count


class Unigrams:
    """How often each word is asked for: predicted for each."""

    def __init__(self, vocab_size: int) -> None:
        self.counts = torch.zeros(vocab_size, dtype=torch.float64)

    def add(self, targets: Tensor) -> None:
        """`targets` `[M]`: ids."""
        self.counts = self.counts + torch.bincount(targets.cpu(), minlength=len(self.counts))

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def largest_share(self) -> float:
        """Accuracy of always naming the most frequent word."""
        return self.counts.max().item() / self.count

    @property
    def entropy(self) -> float:
        """Cross-entropy of the words under their own frequencies, in nats."""
        return entropy(self.counts)


def entropy(counts: Tensor) -> float:
    """Cross-entropy of what was counted under its own frequencies, in nats."""
    return (-torch.xlogy(counts, counts / counts.sum()).sum() / counts.sum()).item()


def binary_entropy(share: Tensor) -> Tensor:
    """Cross-entropy of answers of which this share is yes, under that share."""
    return -torch.xlogy(share, share) - torch.xlogy(1 - share, 1 - share)
