"""A whole training step waits for the device nowhere: on meta tensors every look at a value raises."""

import pytest
import torch
from random_batch import random_batch, small_model

from engine.objectives import PretrainingModule, build_objectives
from engine.training.command_line import parse


def step_on_meta(module):
    """Forward and backward of all three losses on tensors without data."""
    batch = random_batch(range(6)).to("meta")
    batch.normalizers = {name: torch.tensor(1.0, device="meta") for name in batch.counts}
    loss, losses, _ = module(batch)
    loss.backward()
    return losses


@pytest.fixture
def module():
    objectives = parse(["--config=engine/recipes/quickstart.yaml"]).objectives
    model = small_model(dropout=0.1)
    model.rng.to("meta")
    return PretrainingModule(model, build_objectives(objectives)).to("meta")


def test_a_training_step_hides_no_sync(module):
    assert set(step_on_meta(module)) == {"contrastive", "matching", "masked_language"}
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_hidden_sync_is_caught(module):
    module.model.logit_scale.register_hook(lambda gradient: gradient * gradient.sum().item())
    with pytest.raises(RuntimeError, match="meta"):
        step_on_meta(module)
