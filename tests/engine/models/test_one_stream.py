"""One stream of words and regions: embedding by hand, batches that lack a modality, dropout, checkpointing."""

import pytest
import torch
from random_pairs import TASKS, region_batch, small_one_stream

from engine.objectives import PretrainingModule, build_objectives
from engine.sections import MaskedRegionClasses, MaskedRegionFeatures, Objectives, RandomMatching

FOUR = Objectives(
    contrastive=None,
    matching=None,
    masked_region_features=MaskedRegionFeatures(),
    masked_region_classes=MaskedRegionClasses(),
    random_matching=RandomMatching(),
)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_learns_its_batch(task):
    model, batch = small_one_stream(), region_batch(range(6))
    module = PretrainingModule(model, build_objectives(FOUR))
    batch.task = (task,)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    values = []
    for _ in range(30):
        total, losses, _ = module(batch)
        assert task in losses and set(losses) <= {task, "word_region_alignment"}
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(losses[task].item())
    assert values[-1] < 0.5 * values[0]
