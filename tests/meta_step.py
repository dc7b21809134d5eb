"""A training step on tensors without data, where every look at a value raises: on a device it would wait there."""

import torch

from engine.batch import Batch
from engine.objectives import PretrainingModule


def step_on_meta(module: PretrainingModule, batch: Batch) -> dict[str, torch.Tensor]:
    """Forward and backward of the batch's losses, which are the result."""
    batch = batch.to("meta")
    batch.normalizers = {name: torch.tensor(1.0, device="meta") for name in batch.counts}
    loss, losses, _ = module(batch)
    loss.backward()
    return losses


def in_half_precision(module: PretrainingModule) -> PretrainingModule:
    """As a run in bfloat16 has it: weights are shortened, all else stays."""
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()
    return module


def to_meta(module: PretrainingModule) -> PretrainingModule:
    """With the state of its draws."""
    module.model.rng.to("meta")
    return module.to("meta")
