"""The stand-in model under each ZeRO stage, and the same in plain PyTorch."""

from dataclasses import replace

import torch
from standin import StandInModule, small_config, stream

from engine.config import Config
from engine.sections import Optimizer, Rule
from engine.training import zero
from engine.training.optimizer import freeze, make_optimizer
from engine.training.step import agree, normalizers, run_window

STEPS = 6
SGD = Optimizer(kind="sgd", lr=0.02, weight_decay=0.0, clip=0.0)
ADAMW = Optimizer(kind="adamw", lr=0.02, eps=1e-3, weight_decay=0.1, clip=0.5)  # eps far above rounding
MIXED = replace(ADAMW, rules={"trunk": Rule(kind="sgd", momentum=0.9)}, freeze=["branch", "norm"])
KINDS = {
    "accumulated": {"optimizer": SGD, "accumulation": 2, "alternate": False},
    "alternating": {"optimizer": SGD, "accumulation": 1, "alternate": True},
    "a rule per group and a frozen part": {"optimizer": MIXED, "accumulation": 2, "alternate": False},
    "alternating, with moments and decay": {"optimizer": ADAMW, "accumulation": 2, "alternate": True},
}


def plain_curve(optimizer: Optimizer, alternate: bool) -> list[dict]:
    """The definition: one process, one batch, torch's optimizer. Loss, gradient norm and weights.

    A branch that a step does not use has the gradient 0.
    """
    config = small_config(optimizer=optimizer)
    module = StandInModule()
    freeze(optimizer.freeze, module.model.named_parameters())
    rule = make_optimizer(optimizer, module.model.named_parameters(), torch.device("cpu"))
    points = []
    windows = stream(config, alternate=alternate)
    for _ in range(STEPS):
        (batch,) = next(windows)
        batch.normalizers = normalizers(batch.counts, 1, torch.device("cpu"))
        loss, _, _ = module(batch)
        rule.zero_grad(set_to_none=False)
        loss.backward()
        for unused in (p for p in module.parameters() if p.grad is None):
            unused.grad = torch.zeros_like(unused)
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), optimizer.clip or float("inf"))
        rule.step()
        module.model.rng.advance()
        points.append({"loss": loss.item(), "gradient_norm": norm.item(), "weights": weights_of(module)})
    return points


def zero_curve(stage: int, optimizer: Optimizer, alternate: bool, accumulation: int) -> list[dict]:
    """The same through the engine, on all ranks."""
    config = small_config(stage, accumulation=accumulation, optimizer=optimizer)
    ranks = zero.join(config)
    engine = small_engine(config, ranks)
    windows = stream(config, ranks.rank, ranks.world, alternate=alternate)
    points = []
    for _ in range(STEPS):
        window = next(windows)
        agreement = agree(window, ranks, stop=False)
        result = run_window(engine, window, agreement.counts, ranks, engine.module.model.rng)
        assert result.applied
        loss = ranks.mean(result.values["loss"].clone()).item()
        with engine.whole_module() as whole:
            points.append({"loss": loss, "gradient_norm": engine.gradient_norm, "weights": weights_of(whole)})
    return points


def small_engine(config: Config, ranks: zero.Ranks) -> zero.Engine:
    module = StandInModule()
    freeze(config.optimizer.freeze, module.model.named_parameters())
    rule = make_optimizer(config.optimizer, module.model.named_parameters(), ranks.device)
    return zero.Engine(config, module, rule, ranks)


def weights_of(module: torch.nn.Module) -> dict[str, list[float]]:
    return {name: p.flatten().tolist() for name, p in module.named_parameters()}
