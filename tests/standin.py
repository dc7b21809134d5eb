"""A model and batches as small as the trainer's contract allows, for tests that are about the trainer."""

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import vlkernels as vk
from torch import nn

from engine.config import Config
from engine.objectives import Objectives
from engine.objectives.masked_language import MaskedLanguage
from engine.sections import Optimizer, Schedule, Train, Zero
from vlkernels.core.random import dropout_scale, keep_mask

WIDTH = 6
DROPOUT = 0.25


def small_config(stage: int = 1, **options) -> Config:
    """SGD, no clipping, every step logged; `options` go to train, or to the whole where Config knows them."""
    known = {f.name for f in dataclasses.fields(Config)}
    whole = {name: value for name, value in options.items() if name in known}
    train = {name: value for name, value in options.items() if name not in known}
    defaults = {
        "objectives": Objectives(masked_language=MaskedLanguage()),
        "optimizer": Optimizer(kind="sgd", lr=0.02, weight_decay=0.0, clip=0.0),
        "schedule": Schedule(kind="constant"),
        "device": "cpu",
        "zero": Zero(stage),
    }
    train = Train(**{"global_batch": 8, "max_steps": 4, "log_every": 1, **train})
    return Config(**{**defaults, **whole}, train=train)


@dataclass
class StandInBatch:
    """Rows of inputs, some of which also count as tokens: unevenly many per rank and micro-step."""

    x: torch.Tensor
    is_token: torch.Tensor
    sample_ids: torch.Tensor
    counts: dict
    text_task: bool = True
    normalizers: dict = field(default_factory=dict)
    faults: list = field(default_factory=list)

    @property
    def layout(self):
        return SimpleNamespace(num_tokens=len(self.x))

    def to(self, device, non_blocking=False):
        return self


def stream(config: Config, rank: int = 0, world: int = 1, position: int = 0, alternate: bool = False):
    """Windows of a pure function of the stream position; with `alternate`, odd steps leave one branch out."""
    size = config.micro_batch(world)
    while True:
        step = position // config.train.global_batch
        window = []
        for micro_step in range(config.micro_steps(world)):
            first = (micro_step * world + rank) * size
            rows = range(position + first, position + first + size)
            draws = [torch.Generator().manual_seed(row) for row in rows]
            x = torch.stack([torch.randn(WIDTH, generator=draw) for draw in draws])
            is_token = torch.tensor([row % 3 == 0 for row in rows])
            counts = {"pairs": size, "tokens": int(is_token.sum())}
            ids = torch.arange(first, first + size)
            window.append(StandInBatch(x, is_token, ids, counts, not (alternate and step % 2)))
        position += config.train.global_batch
        yield window


class StandIn(nn.Module):
    """A shared trunk with dropout drawn by sample, and a branch that some steps do not use."""

    def __init__(self, seed: int):
        super().__init__()
        self.trunk = nn.Linear(WIDTH, 16)
        self.norm = nn.LayerNorm(16)
        self.branch = nn.Linear(16, WIDTH)
        self.head = nn.Linear(16, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))
        self.rng = vk.Rng(seed)

    def hidden(self, batch: StandInBatch):
        hidden = self.norm(torch.tanh(self.trunk(batch.x.to(self.trunk.weight.dtype))))
        columns = torch.arange(hidden.shape[1])
        keep = keep_mask(self.rng.state, 1, batch.sample_ids[:, None], 0, columns, DROPOUT)
        return hidden * keep * dropout_scale(DROPOUT)


class StandInModule(nn.Module):
    """What the engine wraps: `module(batch)` -> total loss, named losses, report."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.model = StandIn(seed)

    def batch_coupled(self, batch: StandInBatch):
        return []

    def forward(self, batch: StandInBatch, step_losses=None):
        model = self.model
        hidden = model.hidden(batch)
        target = batch.x.to(hidden.dtype).flip(1)
        errors = (model.head(hidden) * model.scale - target).square().sum(1)
        losses = {"pairs": errors.sum() * batch.normalizers["pairs"]}
        if batch.text_task:
            errors = (model.branch(hidden) - target).square().sum(1)
            losses["tokens"] = (errors * batch.is_token).sum() * batch.normalizers["tokens"]
        return sum(losses.values()), losses, {"hidden_norm": hidden.detach().float().norm()}
