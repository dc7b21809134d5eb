"""Pretrain a model: the table of contents of a run.

    deepspeed engine/pretrain.py --config engine/recipes/quickstart.yaml [--section.key value ...]
    python engine/pretrain.py --config engine/recipes/quickstart.yaml        (one process, no launcher)

Exit codes: 0 done, or stopped by Ctrl-C and saved; 143 stopped by SIGTERM and saved; 130 Ctrl-C outside of training, or
twice; 2 a mistake in the configuration or the data, told in one line; 1 the run could not go on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.build import build_model
from engine.config import Config
from engine.data import (
    DataError,
    Source,
    Tokenizer,
    TrainingSets,
    check_streams,
    held_out_batches,
    load_source,
    load_tokenizer,
    load_training_sets,
    make_tokenizer,
    training_stream,
)
from engine.evaluation import describe, evaluate
from engine.evaluation.zero_shot import find_classes
from engine.export import export
from engine.initial_weights import load_initial_weights
from engine.objectives import PretrainingModule
from engine.sections import require
from engine.training import zero
from engine.training.checkpoint import Checkpoints, Progress
from engine.training.command_line import one_line_errors, parse
from engine.training.loop import Trainer, TrainingStopped
from engine.training.optimizer import LearningRate, freeze, make_optimizer
from engine.training.run_folder import CHECKPOINTS, has_checkpoint, open_run
from engine.training.telemetry import Telemetry


def main(argv: list[str] | None = None) -> int:
    """One run, from its command line to its exit code."""
    config = parse(argv)
    with one_line_errors():
        ranks = zero.join(config)
        start = open_run(config, ranks)
        sets, held_out, tokenizer = open_data(config, ranks, start)
        checkpoints = Checkpoints(config, ranks, Path(config.folder) / CHECKPOINTS)
        saved = checkpoints.newest(start / CHECKPOINTS)
        engine, learning_rate = build_engine(config, ranks, tokenizer.vocab_size, saved is None, tokenizer.ids)
        rng = engine.module.model.rng
        progress = checkpoints.load(saved, engine, rng) if saved else Progress()
        require_steps_left(config, progress)

    telemetry = Telemetry(config, ranks, progress.step)
    telemetry.say(opening_line(config, ranks, engine, sets, progress))
    if found := [*sets.ledger.faults, *held_out.ledger.faults]:
        telemetry.warn(progress.step, "found in the data", found)
    evaluation = held_out_evaluation(config, ranks, engine, held_out, tokenizer, telemetry)
    trainer = Trainer(config, ranks, engine, rng, learning_rate, checkpoints, telemetry, progress, evaluation)
    done = {"step": progress.step, "samples_seen": progress.samples_seen}
    stream = training_stream(config, sets, tokenizer, ranks.rank, ranks.world, **done)
    try:
        interruption = trainer.train(stream)
        if progress.step == config.train.total_steps:
            export_model(config, ranks, engine, tokenizer)
            telemetry.finished(progress, evaluation(sheet=Path(config.folder) / "retrievals.png"))
        else:
            telemetry.say(f"stopped and saved at step {progress.step}; the same command goes on from there")
        return interruption.exit_code
    except TrainingStopped as stopped:
        if ranks.is_main:
            print(f"pretrain: stopped at step {progress.step}: {stopped}", file=sys.stderr)
        return 1
    finally:
        telemetry.close()


def open_data(config: Config, ranks: zero.Ranks, start: Path) -> tuple[TrainingSets, Source, Tokenizer]:
    """Training and held-out records, and the tokenizer: a new one, or the one the run began with."""

    def open_once() -> tuple[TrainingSets, Source, Tokenizer]:
        sets = load_training_sets(config)
        held_out = load_source(config.data, "held_out")
        if config.evaluation.zero_shot is not None:
            find_classes(config.evaluation.zero_shot)  # a mistake is told now, not after hours of training
        known = start / "tokenizer.json"
        own = Path(config.folder) / "tokenizer.json"
        if ranks.is_main:
            begun = known.exists() and has_checkpoint(start)
            (load_tokenizer(known) if begun else make_tokenizer(config, sets)).save(own)
        tokenizer = load_tokenizer(own)
        check_streams(config, sets, held_out, tokenizer)  # indices too: what one process writes the others find
        return sets, held_out, tokenizer

    return ranks.main_first(open_once)


def build_engine(
    config: Config, ranks: zero.Ranks, vocab_size: int, new: bool = True, words: Mapping[str, int] | None = None
) -> tuple[zero.Engine, LearningRate]:
    """Model, objectives and optimizer under ZeRO. Weights of a new run depend on seed and init_from alone; `words` are the
    ids of its tokens, by which it takes rows of a folder with other ones."""
    torch.manual_seed(config.seed)
    model = build_model(config, vocab_size)
    model.rng.state[0] = config.seed
    for line in ranks.main_first(lambda: load_initial_weights(config, model, words)) if new else ():
        if ranks.is_main:
            print(line, flush=True)
    if model.teacher is not None:
        model.teacher.begin()
    freeze(config.optimizer.freeze, model.named_parameters())
    optimizer = make_optimizer(config.optimizer, model.named_parameters(), ranks.device)
    learning_rate = LearningRate(config, optimizer)
    module = PretrainingModule(model, config.objectives.active)
    engine = zero.Engine(config, module, optimizer, ranks)
    torch.manual_seed(config.seed + 1 + ranks.rank)
    return engine, learning_rate


def held_out_evaluation(
    config: Config,
    ranks: zero.Ranks,
    engine: zero.Engine,
    held_out: Source,
    tokenizer: Tokenizer,
    telemetry: Telemetry,
) -> Callable[..., dict[str, Any]]:
    """An evaluation to call on every rank: rank 0 computes, the others wait. Training draws do not notice.

    Data that cannot be evaluated stop the run on every rank; faults that are met for the first time are named.
    """

    def evaluation(sheet: Path | None = None) -> dict[str, Any]:
        results: dict[str, Any] = {}
        failure, known = None, len(held_out.ledger.faults)
        with torch.random.fork_rng(), engine.whole_module() as module:
            if ranks.is_main:
                read = functools.partial(held_out_batches, config, held_out, tokenizer)
                try:
                    results = evaluate(module.model, read, config, tokenizer=tokenizer, sheet=sheet)
                    telemetry.say(describe(results))
                except DataError as error:
                    failure = f"the evaluation is not possible: {error}"
                for fault in held_out.ledger.faults[known:]:
                    telemetry.say(f"held-out data: {fault}")
        if failure := ranks.gather(failure)[0]:
            raise TrainingStopped(failure)
        return results

    return evaluation


def require_steps_left(config: Config, progress: Progress) -> None:
    """A checkpoint cannot be taken back to an earlier step."""
    require(
        progress.step <= config.train.total_steps,
        f"{config.folder} is at step {progress.step} already, past the {config.train.total_steps} steps asked "
        "for: raise train.max_steps or train.max_pairs, or begin anew with train.resume never",
    )


def export_model(config: Config, ranks: zero.Ranks, engine: zero.Engine, tokenizer: Tokenizer) -> None:
    """Write what `engine.load` reads beside the checkpoints; on every rank."""
    with engine.whole_module() as module:
        if ranks.is_main:
            export(config.folder, module.model, config, tokenizer)
    ranks.barrier()


def opening_line(
    config: Config, ranks: zero.Ranks, engine: zero.Engine, sets: TrainingSets, progress: Progress
) -> str:
    """The run in one line."""
    buckets = config.train.buckets
    unit = "pairs" if buckets is None else f"batches of {buckets.tokens} tokens"
    size = f"{engine.num_parameters / 1e6:.2f} M parameters"
    steps = f"steps {progress.step}-{config.train.total_steps} of {config.train.global_batch} {unit}"
    machine = f"{config.precision}, ZeRO {config.zero.stage}, {ranks.world} x {ranks.device.type}"
    names = config.data.source if config.data.sets is None else ", ".join(config.data.sets)
    names = names if config.data.texts is None else f"{names} and {config.data.texts.source}"
    source = f"{len(sets)} records of {names}, evaluated on {config.data.held_out}"
    return f"{config.folder}: {steps} from {source}, {size}, {machine}"


if __name__ == "__main__":
    zero.leave(main)
