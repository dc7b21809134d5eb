"""One optimizer step: a window of micro-batches, normalised over all ranks before its first backward."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import vlkernels as vk
from torch import Tensor

from engine.batch import Batch
from engine.training.feature_cache import read_ahead
from engine.training.zero import Engine, Ranks


MAX_COUNTS = 8


@dataclass
class Agreement:
    """What all ranks know about a window before it runs."""

    stop: bool
    failed: bool
    num_faults: int
    tokens: int
    counts: dict[str, int]
    """By what is counted; "pairs" are always among it."""


def agree(window: list[Batch], ranks: Ranks, stop: bool) -> Agreement:
    """Sums over the ranks, in one exchange of integers. A rank whose data failed brings an empty window."""
    names = sorted(window[0].counts) if window else []
    assert len(names) <= MAX_COUNTS, f"at most {MAX_COUNTS} counts per batch, got {names}"
    counts = [sum(batch.counts[name] for batch in window) for name in names]
    faults = sum(len(batch.faults) for batch in window)
    tokens = sum(batch.layout.num_tokens for batch in window)
    padding = [0] * (MAX_COUNTS - len(names))
    summed = ranks.sum_integers([stop, not window, faults, tokens, *counts, *padding])
    stops, failures, num_faults, tokens, *totals = summed
    return Agreement(stops > 0, failures > 0, num_faults, tokens, dict(zip(names, totals)))


def normalizers(counts: dict[str, int], parts: int, device: torch.device) -> dict[str, Tensor]:
    """Factors that make the mean of `parts` local sums (ranks x micro-steps) the mean over all counted."""
    return {
        name: torch.full((), parts / count if count else 0.0, dtype=torch.float32, device=device)
        for name, count in counts.items()
    }


@dataclass
class StepResult:
    """Device tensors, so that a step waits for nothing but the update itself."""

    applied: bool
    values: dict[str, Tensor]


def run_window(
    engine: Engine, window: list[Batch], counts: dict[str, int], ranks: Ranks, rng: vk.Rng
) -> StepResult:
    """Forward and backward of every micro-batch, then the update, and what follows it; before them all, the losses over
    the whole window.

    `rng` advances once: sample ids count through the whole window, so draws do not depend on how it is cut.
    """
    factors = normalizers(counts, ranks.world * len(window), ranks.device)
    values: dict[str, Tensor] = {}
    applied = True
    for batch, first in zip(window, read_ahead(engine, window, ranks.device), strict=True):
        batch = batch.to(ranks.device, non_blocking=True)
        batch.normalizers = factors
        first.draw_alike(ranks.device)
        loss, losses, report = engine(batch, first.step_losses)
        engine.backward(loss)
        applied = engine.step()
        for name, value in {"loss": loss, **losses, **report}.items():
            values[name] = values.get(name, 0) + value.detach().float() / len(window)
    engine.after_step(applied)
    rng.advance()
    return StepResult(applied, values)


@dataclass
class Meter:
    """Means since the last line of the log, each over the steps that had it; skipped steps do not count."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, result: StepResult, agreement: Agreement, seconds: float) -> None:
        self.pairs += agreement.counts["pairs"]
        self.tokens += agreement.tokens
        self.seconds += seconds
        if result.applied:
            for name, value in result.values.items():
                self.sums[name] = self.sums.get(name, 0) + value
                self.steps[name] += 1

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Means over the steps and the ranks; on every rank. All ranks had the same tasks, so these names."""
        if not self.sums:
            return {}
        stacked = torch.stack([value / self.steps[name] for name, value in self.sums.items()])
        return dict(zip(self.sums, ranks.mean(stacked).tolist(), strict=True))

    def speeds(self) -> dict[str, float]:
        """Of all ranks together."""
        seconds = max(self.seconds, 1e-9)
        return {"samples_per_s": self.pairs / seconds, "tokens_per_s": self.tokens / seconds}
