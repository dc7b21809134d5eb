"""The training loop: window after window of micro-batches, with logs, checkpoints and evaluations between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NoReturn

import vlkernels as vk

from engine.batch import Batch
from engine.config import Config
from engine.data import DataError
from engine.training.checkpoint import Checkpoints, Progress
from engine.training.interruption import Interruption
from engine.training.optimizer import LearningRate
from engine.training.step import Agreement, Meter, agree, run_window
from engine.training.telemetry import Telemetry
from engine.training.zero import Engine, Ranks

MAX_SKIPPED_IN_A_ROW = 20  # fp16 begins with a scale that is too large and halves it at every skipped step


class TrainingStopped(RuntimeError):
    """One clear line why a run cannot go on."""


def next_window(stream: Iterator[list[Batch]]) -> tuple[list[Batch], str | None]:
    """The next window, or none and the reason."""
    try:
        return next(stream), None
    except DataError as error:
        return [], str(error)


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


class Trainer:
    """Takes a run from `progress` to its last step."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        engine: Engine,
        rng: vk.Rng,
        learning_rate: LearningRate,
        checkpoints: Checkpoints,
        telemetry: Telemetry,
        progress: Progress,
        evaluate: Callable[[], dict[str, Any]],
    ):
        self.config, self.ranks, self.engine, self.rng = config, ranks, engine, rng
        self.learning_rate, self.checkpoints, self.telemetry = learning_rate, checkpoints, telemetry
        self.progress, self.evaluate = progress, evaluate
        self.total_steps = config.train.total_steps
        self.meter = Meter()

    def train(self, stream: Iterator[list[Batch]]) -> Interruption:
        """Run until the last step or a signal; either way the last state is saved."""
        self.saved_step = first_step = self.progress.step
        with Interruption() as interruption:
            while self.progress.step < self.total_steps:
                started = time.perf_counter()
                window, failure = next_window(stream)
                agreement = agree(window, self.ranks, interruption.requested)
                if agreement.failed:
                    self.stop_for_data(failure)
                if agreement.stop:
                    break
                with vk.recorded() if self.progress.step == first_step else nullcontext() as served:
                    self.take_step(window, agreement, started)
                if served is not None:
                    self.telemetry.started(self.progress.step, self.ranks.world, served)
                    if self.config.train.compile:  # not before: graphs would be bound to the recording
                        self.engine.compile_blocks()
                self.look_after_step(window, agreement)
            self.save()
        return interruption

    def take_step(self, window: list[Batch], agreement: Agreement, started: float) -> None:
        """One optimizer step."""
        progress = self.progress
        self.lr = self.learning_rate.set(progress.step)
        for batch in window:
            batch.progress = progress.step / self.total_steps
        result = run_window(self.engine, window, agreement.counts, self.ranks, self.rng)
        seconds = time.perf_counter() - started
        self.meter.add(result, agreement, seconds)
        progress.step += 1
        progress.samples_seen += agreement.counts["pairs"]
        progress.seconds += seconds
        progress.skipped += not result.applied
        progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1

    def look_after_step(self, window: list[Batch], agreement: Agreement) -> None:
        """Report what went wrong; log, save and evaluate when it is time."""
        progress, train = self.progress, self.config.train
        if agreement.num_faults:
            self.report_faults(window)
        if progress.skipped_in_a_row:
            self.report_skip()
        if is_due(train.log_every, progress.step) or progress.step == self.total_steps:
            self.log()
        if is_due(train.save_every, progress.step):
            self.save()
        if is_due(train.evaluate_every, progress.step) and progress.step < self.total_steps:
            self.telemetry.evaluated(progress.step, self.evaluate())

    def stop_for_data(self, failure: str | None) -> NoReturn:
        """Save, and end the run on every rank with the line of the rank whose data failed."""
        self.save()
        raise TrainingStopped(next(line for line in self.ranks.gather(failure) if line is not None))

    def report_faults(self, window: list[Batch]) -> None:
        """Name the broken records of every rank that met some."""
        mine = [fault for batch in window for fault in batch.faults]
        faults = [fault for part in self.ranks.gather(mine) for fault in part]
        self.progress.faults += len(faults)
        self.telemetry.warn(self.progress.step, "broken record", faults)

    def report_skip(self) -> None:
        """Count a step whose gradient was not finite; too many in a row mean that the run has diverged."""
        in_a_row = self.progress.skipped_in_a_row
        line = f"the gradient is not finite ({in_a_row} in a row): weights kept"
        self.telemetry.warn(self.progress.step, "skipped step", [line])
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingStopped(
                f"the gradient was not finite in {in_a_row} steps in a row, up to step {self.progress.step}: "
                f"lower optimizer.lr = {self.config.optimizer.lr} or look at the data"
            )

    def log(self) -> None:
        row = {
            "samples_seen": self.progress.samples_seen,
            **self.meter.means(self.ranks),
            **({"steps": self.meter.steps} if self.config.data.sets else {}),
            "lr": self.lr,
            "grad_norm": self.engine.gradient_norm,
            **self.meter.speeds(),
            "skipped": self.progress.skipped,
            "faults": self.progress.faults,
        }
        self.telemetry.log(self.progress.step, row)
        self.meter = Meter()

    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved_step < self.progress.step:
            self.checkpoints.save(self.engine, self.rng, self.progress)
            self.saved_step = self.progress.step
