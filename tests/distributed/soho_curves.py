"""SOHO's recipe, shrunk, under ZeRO, and in one plain process: losses, weights, codes and the statistics of batch norms."""

from pathlib import Path

import torch
from launch import ROOT
from quickstart_curves import windows
from torch import Tensor, nn

from engine import pretrain
from engine.build import build_model
from engine.config import Config
from engine.models.states import FollowsSteps
from engine.objectives import PretrainingModule
from engine.training import zero
from engine.training.checkpoint import Checkpoints, Progress
from engine.training.command_line import parse
from engine.training.optimizer import make_optimizer
from engine.training.step import agree, normalizers, run_window

STEPS, SAVED, STAGES = 5, 3, (2, 3)

Point = tuple[dict[str, float], dict[str, Tensor]]
"""After a step: its losses, and all states of the model."""


def soho(cache: str, stage: int = 2) -> Config:
    """SGD, whose rates for the backbone are the recipe's own; few codes, so that several cells choose each."""
    sgd = ["--optimizer.kind=sgd", "--optimizer.lr=0.05", "--optimizer.weight_decay=0", "--optimizer.clip=0"]
    run = ["--tiny=true", "--device=cpu", "--precision=fp32", f"--data.cache={cache}", f"--zero.stage={stage}"]
    rest = ["--schedule.warmup_steps=0", "--model.joint.image.codes=24"]
    return parse(["--config", str(ROOT / "engine" / "recipes" / "soho.yaml"), *sgd, *run, *rest])


def plain_points(cache: str) -> list[Point]:
    """The definition: one process, one batch, torch's SGD."""
    config = soho(cache)
    vocab_size, stream = windows(config, rank=0, world=1)
    torch.manual_seed(config.seed)
    model = build_model(config, vocab_size)
    model.rng.state[0] = config.seed
    module = PretrainingModule(model, config.objectives.active)
    optimizer = make_optimizer(config.optimizer, model.named_parameters(), torch.device("cpu"))
    points = []
    for _, (batch,) in zip(range(STEPS), stream):
        batch.normalizers = normalizers(batch.counts, 1, torch.device("cpu"))
        loss, losses, _ = module(batch)
        loss.backward()
        for parameter in module.parameters():  # what no loss read decays and moves on, as under every stage
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        optimizer.zero_grad()
        model.rng.advance()
        for part in module.modules():
            if isinstance(part, FollowsSteps):
                part.after_step(applied=True)
        points.append(({name: value.item() for name, value in losses.items()}, states(model)))
    return points


def zero_points(cache: str, stage: int, folder: str) -> tuple[list[Point], dict[str, Tensor]]:
    """The same through the engine, on all ranks; and where a run ends that goes on from its checkpoint."""
    config = soho(cache, stage)
    ranks = zero.join(config)
    vocab_size, stream = windows(config, ranks.rank, ranks.world)
    checkpoints = Checkpoints(config, ranks, Path(folder) / str(stage))
    read = [next(stream) for _ in range(STEPS)]
    engine, _ = pretrain.build_engine(config, ranks, vocab_size)
    points = run(engine, ranks, read[:SAVED])
    checkpoints.save(engine, engine.module.model.rng, Progress(SAVED))
    points += run(engine, ranks, read[SAVED:])
    resumed, _ = pretrain.build_engine(config, ranks, vocab_size)
    checkpoints.load(checkpoints.newest(), resumed, resumed.module.model.rng)
    return points, run(resumed, ranks, read[SAVED:])[-1][1]


def run(engine: zero.Engine, ranks: zero.Ranks, steps: list[list]) -> list[Point]:
    """A point for each step. Between steps all weights are looked at, as an evaluation does: DeepSpeed must not mind."""
    points = []
    for window in steps:
        result = run_window(engine, window, agree(window, ranks, stop=False).counts, ranks, engine.module.model.rng)
        assert result.applied
        (name,) = window[0].task
        loss = ranks.mean(result.values[name]).item()
        with engine.whole_module() as whole:
            points.append(({name: loss}, states(whole.model)))
    return points


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
