"""Passes over a batch: each runs once, and each draws masks of its own."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import vlkernels as vk
from torch import Tensor

from engine.batch import Batch

T = TypeVar("T")

MOST_PASSES = 64
"""Passes of one batch whose draws differ."""


class Variant(enum.IntEnum):
    """Passes that run the same layers on the same sample, yet must draw different dropout. Those over views follow."""

    PLAIN = 0
    NEGATIVE_TEXT = 1
    NEGATIVE_IMAGE = 2

    def identities(self, sample_ids: Tensor) -> Tensor:
        """Sample ids for `vk.Rng` that no other pass of the step has."""
        return identities(sample_ids, self)


def identities(sample_ids: Tensor, number: int) -> Tensor:
    """Sample ids for `vk.Rng` of the pass with this number."""
    assert number < MOST_PASSES, f"a batch has at most {MOST_PASSES} passes, got number {number}"
    return sample_ids * MOST_PASSES + number


def drawn_as(layout: vk.SegmentLayout, batch: Batch, view: str | None, stage: int = 0) -> vk.SegmentLayout:
    """The layout with the identities of a pass over a view (None: over what is there).

    `stage` tells passes of roles with common layers apart.
    """
    views = len(batch.views) + len(Variant)
    number = Variant.PLAIN if view is None else len(Variant) + sorted(batch.views).index(view)
    return layout.with_sample_ids(identities(batch.sample_ids, stage * views + number))


class SharedPasses:
    """Remembers passes over batches while objectives ask for them."""

    _passes: dict[tuple[int, str], Any] | None = None

    @contextlib.contextmanager
    def passes_shared(self) -> Iterator[None]:
        """Inside, each pass over a batch runs once, whichever objectives ask for it."""
        self._passes = {}
        try:
            yield
        finally:
            self._passes = None

    def _once(self, batch: Batch, name: str, compute: Callable[[], T]) -> T:
        if self._passes is None:
            return compute()
        key = (id(batch), name)
        if key not in self._passes:
            self._passes[key] = compute()
        return self._passes[key]
