"""One optimizer step over 512 pairs, however they are cut into micro-batches, and the same in plain PyTorch."""

from unittest.mock import patch

import torch
from random_batch import random_batch, small_model

from engine.batch import Batch
from engine.config import Config
from engine.objectives import Objectives, PretrainingModule
from engine.objectives.contrastive import Contrastive
from engine.objectives.masked_language import MaskedLanguage
from engine.sections import Optimizer, Schedule, Train, Zero
from engine.training import zero
from engine.training.optimizer import make_optimizer
from engine.training.step import StepResult, agree, normalizers, run_window

PAIRS = 512
RATE = 1024.0
"""Weights are small beside their change, which is then the gradient."""
OBJECTIVES = Objectives(contrastive=Contrastive(), masked_language=MaskedLanguage())
STAGES = (0, 1, 2, 3)


def training_module(recompute: bool) -> PretrainingModule:
    """ITC and MLM together, dropout everywhere."""
    model = small_model(dropout=0.1)
    model.checkpoint_activations(recompute)
    return PretrainingModule(model, OBJECTIVES.active)


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def plain_step() -> dict:
    """The definition: one process, one batch, torch's SGD, nothing recomputed."""
    module, batch = training_module(recompute=False), random_batch(range(PAIRS))
    batch.normalizers = normalizers(batch.counts, 1, torch.device("cpu"))
    before = weights_of(module)
    loss, losses, report = module(batch)
    loss.backward()
    torch.optim.SGD(module.parameters(), RATE).step()
    return outcome({"loss": loss, **losses, **report}, before, weights_of(module))


def cut(micro_batch: int, rank: int = 0, world: int = 1) -> list[Batch]:
    """This rank's micro-batches, as the data stream would make them."""
    starts = range(rank * micro_batch, PAIRS, world * micro_batch)
    return [random_batch(range(start, start + micro_batch)) for start in starts]


def configuration(stage: int, micro_batch: int, precision: str) -> Config:
    return Config(
        objectives=OBJECTIVES,
        optimizer=Optimizer(kind="sgd", lr=RATE, weight_decay=0.0, clip=0.0),
        schedule=Schedule(kind="constant"),
        train=Train(global_batch=PAIRS, micro_batch=micro_batch, max_steps=1),
        device="cpu",
        precision=precision,
        zero=Zero(stage),
    )


def partition_everything(parameters: int, trained: int) -> dict:
    """DeepSpeed's sizes with parameters of any size cut up by ZeRO-3, which leaves small ones whole."""
    return {**_zero_sizes(parameters, trained), "stage3_param_persistence_threshold": 0}


_zero_sizes = zero.zero_sizes


def zero_engine(stage: int, micro_batch: int, precision: str = "fp32") -> tuple[zero.Engine, zero.Ranks]:
    config = configuration(stage, micro_batch, precision)
    ranks = zero.join(config)
    module = training_module(recompute=True)
    rule = make_optimizer(config.optimizer, module.model.named_parameters(), ranks.device)
    with patch.object(zero, "zero_sizes", partition_everything):
        return zero.Engine(config, module, rule, ranks), ranks


def take_window(engine: zero.Engine, ranks: zero.Ranks, window: list[Batch]) -> StepResult:
    agreement = agree(window, ranks, stop=False)
    result = run_window(engine, window, agreement.counts, ranks, engine.module.model.rng)
    assert result.applied
    return result


def zero_step(stage: int, micro_batch: int, precision: str = "fp32") -> dict:
    """The same through the engine, on all ranks."""
    engine, ranks = zero_engine(stage, micro_batch, precision)
    before = weights_of(training_module(recompute=True))
    result = take_window(engine, ranks, cut(micro_batch, ranks.rank, ranks.world))
    means = ranks.mean(torch.stack(list(result.values.values())))
    with engine.whole_module() as whole:
        return outcome(dict(zip(result.values, means, strict=True)), before, weights_of(whole))


def outcome(values: dict, before: dict, after: dict) -> dict:
    """Accuracy is a report of what one rank holds."""
    changes = {name: after[name] - before[name] for name in before}
    values = {name: value.item() for name, value in values.items() if name != "contrastive_accuracy"}
    return {"values": values, "weights": after, "changes": changes}
