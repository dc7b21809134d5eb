"""Held-out samples, as the measures of objectives read them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from engine.batch import Batch
from engine.objectives.parts.gallery import Gallery, encode_gallery
from engine.sections import Evaluation

Figures = dict[str, dict[str, float]]
Read = Callable[[int, "str | None"], Iterable[Batch]]


class NothingToMeasure(ValueError):
    """One line why the held-out samples say nothing about an objective."""


class HeldOut:
    """All measures of one evaluation share it, and with it what several of them need.

    `read(samples, task)` gives batches of so many held-out samples, prepared for one objective or for none (None).
    """

    def __init__(self, read: Read, model: Any, options: Evaluation) -> None:
        self.read, self.model, self.options = read, model, options
        self.device = next(model.parameters()).device
        self.most = 0
        """Samples of the objective that had most."""

    def batches(self, objective: str) -> Iterator[Batch]:
        """All there are, prepared for the objective; its losses are sums over them."""
        seen = 0
        for batch in self.read(self.options.batch, objective):
            seen += batch.counts["pairs"]
            batch.normalizers = {name: torch.ones(()) for name in batch.counts}
            yield batch.to(self.device)
        self.most = max(self.most, seen)

    def first(self, limit: int) -> Batch:
        """At most so many, as one batch prepared for no objective."""
        batch = next(iter(self.read(limit, None)), None)
        require_some(batch is not None, "pairs")
        return batch.to(self.device)

    @functools.cached_property
    def ranked(self) -> list[Batch]:
        """What is ranked against each other: whole batches of together at most `evaluation.gallery` pairs, at least
        one."""
        kept: list[Batch] = []
        pairs = 0
        for batch in self.read(self.options.batch, None):
            pairs += len(batch.labels)
            if kept and pairs > self.options.gallery:
                break
            kept.append(batch.to(self.device))
        require_some(bool(kept), "pairs")
        self.most = max(self.most, sum(len(batch.labels) for batch in kept))
        return kept

    @functools.cached_property
    def gallery(self) -> Gallery:
        """The same, read by both towers."""
        return encode_gallery(self.model, self.ranked)


def require_some(count: int | bool, what: str) -> None:
    if not count:
        raise NothingToMeasure(f"there are no held-out {what} to evaluate")
