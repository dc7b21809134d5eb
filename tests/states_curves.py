"""A model with every kind of state that is no parameter, under each ZeRO stage, and the same in plain PyTorch."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import vlkernels as vk
from standin import WIDTH, small_config, stream
from torch import Tensor, nn

from engine.models.batch_norm import BatchNorm
from engine.models.codebook import Codebook
from engine.models.momentum import FeatureQueue, MomentumCopy
from engine.sections import Optimizer, Rule
from engine.training import zero
from engine.training.optimizer import make_optimizer
from engine.training.step import agree, run_window

STEPS, MOMENTUM, CODES, QUEUE = 5, 0.9, 5, 24
MIXED = Optimizer(lr=0.05, eps=1e-3, rules={"tower.first": Rule(kind="sgd", momentum=0.9)})
SGD = Optimizer(kind="sgd", lr=0.05, weight_decay=0.0, clip=0.0)


class Tower(nn.Module):
    """More columns than stage 3 keeps whole in so small a model, and vectors that it does keep."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(WIDTH, 16), norm, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.second(torch.tanh(self.norm(self.first(x.to(self.first.weight.dtype))))), dim=-1)


class WithStates(nn.Module):
    """A tower that nears its momentum copy's features and leaves the queue's; their codes are its second target."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.tower = Tower(BatchNorm(16))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.codebook = Codebook(CODES, 4)
        self.queue = FeatureQueue(QUEUE, 4)
        self.copy = MomentumCopy(self.tower, MOMENTUM)
        self.rng = vk.Rng(seed)

    def batch_coupled(self, batch):
        return []

    def forward(self, batch, step_losses=None):
        features, keys = self.tower(batch.x), self.copy(batch.x)
        codes, _ = self.codebook(features)
        losses = summands(features, keys, codes, self.queue.features, self.frozen)
        self.queue.push(keys)
        losses = {name: value.float().sum() * batch.normalizers["pairs"] for name, value in losses.items()}
        return sum(losses.values()), losses, {}

    @property
    def model(self):
        return self


def summands(features: Tensor, keys: Tensor, codes: Tensor, queue: Tensor, head) -> dict[str, Tensor]:
    """Of each row."""
    near = -(features * keys).sum(1) + torch.logsumexp(features @ queue.T.to(features.dtype), 1)
    return {"keys": near, "codes": (head(codes) - features).square().sum(1)}


def zero_engine(config) -> tuple[zero.Engine, zero.Ranks]:
    ranks = zero.join(config)
    module = WithStates()
    return zero.Engine(config, module, make_optimizer(config.optimizer, module.named_parameters(), ranks.device), ranks), ranks


def zero_curve(stage: int, accumulation: int, precision: str = "fp32") -> list[dict]:
    """States of a whole run, through the engine, on all ranks."""
    config = small_config(stage, accumulation=accumulation, optimizer=SGD, precision=precision)
    engine, ranks = zero_engine(config)
    windows = stream(config, ranks.rank, ranks.world)
    points = []
    for _ in range(STEPS):
        window = next(windows)
        result = run_window(engine, window, agree(window, ranks, stop=False).counts, ranks, engine.module.rng)
        assert result.applied
        with engine.whole_module() as whole:
            points.append({name: value.flatten().tolist() for name, value in whole.state_dict().items()})
    return points


def plain_curve(accumulation: int) -> list[dict]:
    """The definition, by torch's own batch norm and textbook updates on the global batch; a step is cut into
    micro-batches only where its batch norm sees them."""
    start, config = WithStates(), small_config()
    tower, head = Tower(nn.BatchNorm1d(16)), start.frozen
    tower.load_state_dict(start.tower.state_dict(), strict=False)
    follower = copy.deepcopy(tower).eval()
    states = SimpleNamespace(queue=list(start.queue.features), codes=start.codebook.codes, decayed=(0.0, 0.0))
    rule, windows, points = torch.optim.SGD(tower.parameters(), lr=SGD.lr), stream(config), []
    for step in range(STEPS):
        (batch,) = next(windows)
        features = torch.cat([tower(part) for part in batch.x.chunk(accumulation)])
        keys = follower(batch.x).detach()
        distances = (features.detach()[:, None] - states.codes).square().sum(2)
        chosen = F.one_hot(distances.argmin(1), CODES).float()
        codes = features + (chosen @ states.codes - features).detach()
        losses = summands(features, keys, codes, torch.stack(states.queue), head)
        rule.zero_grad()
        sum(value.mean() for value in losses.values()).backward()
        rule.step()
        with torch.no_grad():
            for mine, theirs in zip(follower.parameters(), tower.parameters(), strict=True):
                mine.copy_(MOMENTUM * mine + (1 - MOMENTUM) * theirs)
            for mine, theirs in zip(follower.buffers(), tower.buffers(), strict=True):
                mine.copy_(theirs)
            states.queue[8 * step % QUEUE : 8 * step % QUEUE + 8] = keys
            decay = min(0.4 * (step + 1), 0.99)
            new = chosen.sum(0), chosen.T @ features
            states.decayed = tuple(decay * old + (1 - decay) * now for old, now in zip(states.decayed, new, strict=True))
            counts, sums = states.decayed
            smoothed = (counts + 1e-5) / (counts.sum() + CODES * 1e-5) * counts.sum()
            states.codes = sums / smoothed[:, None]
        points.append(named(tower, follower, states))
    return points


def named(tower: nn.Module, follower: nn.Module, states: SimpleNamespace) -> dict[str, list[float]]:
    """Under the names of `WithStates`."""
    found = {f"tower.{name}": value for name, value in tower.state_dict().items()}
    found |= {f"copy.module.{name}": value for name, value in follower.state_dict().items()}
    found |= {"queue.features": torch.stack(states.queue), "codebook.codes": states.codes}
    return {name: value.flatten().tolist() for name, value in found.items() if "num_batches" not in name}
