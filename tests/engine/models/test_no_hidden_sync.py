"""A whole training step waits for the device nowhere: on meta tensors every look at a value raises."""

import pytest
import torch
from meta_step import step_on_meta, to_meta
from random_batch import random_batch, small_model
from random_pairs import TASKS, region_batch, small_one_stream

from engine.objectives import PretrainingModule
from engine.training.command_line import parse

LOSSES = {task: {task} for task in TASKS} | {"random_matching": {"random_matching", "word_region_alignment"}}


def module_on_meta(recipe, model):
    objectives = parse([f"--config=engine/recipes/{recipe}.yaml"]).objectives
    return to_meta(PretrainingModule(model, objectives.active))


@pytest.fixture
def module():
    return module_on_meta("quickstart", small_model(dropout=0.1))


def test_a_training_step_hides_no_sync(module):
    assert set(step_on_meta(module, random_batch(range(6)))) == {"contrastive", "matching", "masked_language"}
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_similarities_of_tokens_hide_no_sync():
    """How long pictures and texts are is known on the device alone."""
    module, batch = module_on_meta("filip_b32", small_model()), random_batch(range(6))
    batch.task = ("late_interaction",)
    assert set(step_on_meta(module, batch)) == {"late_interaction"}


@pytest.mark.parametrize("task", TASKS)
def test_a_step_of_one_task_hides_no_sync(task):
    module, batch = module_on_meta("uniter_base", small_one_stream(dropout=0.1)), region_batch(range(6))
    batch.task = (task,)
    assert set(step_on_meta(module, batch)) == LOSSES[task]


def test_the_tasks_together_train_every_parameter():
    module = module_on_meta("uniter_base", small_one_stream(dropout=0.1))
    for task in TASKS:
        batch = region_batch(range(6))
        batch.task = (task,)
        step_on_meta(module, batch)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_hidden_sync_is_caught(module):
    module.model.logit_scale.register_hook(lambda gradient: gradient * gradient.sum().item())
    with pytest.raises(RuntimeError, match="meta"):
        step_on_meta(module, random_batch(range(6)))
