"""One rank of a run of the stand-in model: pretrain.py without data and objectives. Takes options as JSON."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from standin import StandInModule, small_config, stream

from engine.data import DataError
from engine.sections import Optimizer
from engine.training import zero
from engine.training.checkpoint import Checkpoints, Progress
from engine.training.loop import Trainer, TrainingStopped
from engine.training.optimizer import LearningRate, make_optimizer
from engine.training.run_folder import CHECKPOINTS, open_run
from engine.training.telemetry import Telemetry


TROUBLES = ("kill_at", "poison_from", "broken_at", "faulty_at")


def troubled(windows, rank, step, pause, kill_at, poison_from, broken_at, faulty_at):
    """The stream with what may happen to a run: pauses, kill -9, gradients not finite, broken data."""
    for step, window in enumerate(windows, step):
        time.sleep(pause)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if poison_from <= step and rank == 0:
            window[0].x = window[0].x * float("nan")
        if step == broken_at and rank == 0:
            raise DataError("shard 7 ends early")
        if step == faulty_at:
            window[0].faults.append(f"record {rank}: not a picture")
        yield window


def run(**options) -> tuple[int, dict]:
    """Exit code, and what the run left: its step, skipped steps and weights."""
    never = 10**9
    trouble = {name: options.pop(name, never) for name in TROUBLES}
    pause = options.pop("pause", 0.0)
    config = small_config(
        options.pop("stage", 1),
        output=options.pop("output"),
        precision=options.pop("precision", "fp32"),
        optimizer=Optimizer(lr=0.01, lr_multipliers={"trunk": 0.5}, clip=1.0),
        **options,
    )
    ranks = zero.join(config)
    start = open_run(config, ranks)
    module = StandInModule(config.seed)
    optimizer = make_optimizer(config.optimizer, module.model.named_parameters(), ranks.device)
    learning_rate = LearningRate(config, optimizer)
    engine = zero.Engine(config, module, optimizer, ranks)
    rng = engine.module.model.rng
    checkpoints = Checkpoints(config, ranks, Path(config.folder) / CHECKPOINTS)
    saved = checkpoints.newest(start / CHECKPOINTS)
    progress = checkpoints.load(saved, engine, rng) if saved else Progress()
    telemetry = Telemetry(config, ranks, progress.step)
    trainer = Trainer(config, ranks, engine, rng, learning_rate, checkpoints, telemetry, progress, dict)
    windows = stream(config, ranks.rank, ranks.world, progress.samples_seen)
    try:
        interruption = trainer.train(troubled(windows, ranks.rank, progress.step, pause, **trouble))
    except TrainingStopped as stopped:
        return 1, {"step": progress.step, "stopped": str(stopped)}
    finally:
        telemetry.close()
    with engine.whole_module() as whole:
        weights = {name: p.float().flatten().tolist() for name, p in whole.named_parameters()}
    return interruption.exit_code, {"step": progress.step, "skipped": progress.skipped, "weights": weights}


def main() -> int:
    """One run after another; each prints what it left."""
    for options in sys.argv[1:]:
        code, result = run(**json.loads(options))
        print(json.dumps(result), flush=True)
    return code


if __name__ == "__main__":
    zero.leave(main)
