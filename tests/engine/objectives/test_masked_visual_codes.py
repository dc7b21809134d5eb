"""Masked visual codes by hand: what is drawn, what is lost, what is read; and a backbone that is run once per batch."""

from math import e, log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vlkernels as vk

from engine.batch import HiddenCodes, Pixels, Places, Sample, Words
from engine.build import build_model
from engine.data import collate
from engine.data.plan.order import generator
from engine.models.embedding import Cells, cells_of_one_code
from engine.models.transformer import Tokens
from engine.objectives import PretrainingModule
from engine.objectives.masked_visual_codes import MaskedVisualCodes, shares
from engine.objectives.parts.objective import Draw
from engine.recipes import table

NAME = "masked_visual_codes"
GRID = [[0, 0], [0, 1], [1, 0], [1, 1]]


def picture() -> Sample:
    return Sample(None, Pixels(torch.randn(1, 3, 16, 16), torch.tensor(GRID, dtype=torch.int32)), 0)


def test_one_cell_of_every_picture_is_drawn():
    found = []
    for seed in range(400):
        sample = picture()
        MaskedVisualCodes().prepare(sample, Draw(None, lambda seed=seed: generator(seed, 0, 0, 1)))
        found += sample.views[NAME].places.offsets.tolist()
    assert len(found) == 400 and all(abs(found.count(cell) - 100) < 4 * (400 * 3 / 16) ** 0.5 for cell in range(4))


def batch_of(*drawn: int):
    samples = [picture() for _ in drawn]
    for sample, cell in zip(samples, drawn, strict=True):
        sample.views[NAME] = HiddenCodes(Places(torch.zeros(1, dtype=torch.int64), torch.tensor([cell])))
    return collate(samples, range(len(drawn)))


def test_the_loss_by_hand():
    """Codes (1, 0), (0, 1) and (-1, 0), each of a length of its own. The first picture hides two cells of the first code,
    one of whose states finds it and one the third; the second hides one of the second code, whose state is as far from it
    as from none. A code's length and what is not hidden do not matter."""
    batch, layout = batch_of(0, 3), vk.SegmentLayout([[4], [4]])
    index = torch.tensor([0, 1, 0, 2, 0, 0, 2, 1])
    states = torch.full((8, 2), 1e3)
    states[0], states[2], states[7] = torch.tensor([5.0, 0]), torch.tensor([-0.1, 0]), torch.tensor([2.0, 0])
    book = SimpleNamespace(codes=torch.tensor([[3.0, 0], [0, 0.5], [-2, 0]]))
    drawn = batch.views[NAME].places.rows(layout)
    model = SimpleNamespace(
        joint=SimpleNamespace(segment=lambda _: 0, image=SimpleNamespace(dictionary=SimpleNamespace(codebook=book))),
        joint_states=lambda *_: Tokens(states, layout),
        cells=lambda _: Cells(states, states, index),
        hidden_cells=lambda *_: cells_of_one_code(index, drawn, layout),
        impl="auto",
    )
    total = e**2 + 1 + e**-2
    first, second = (log(total / e**2) + log(total / e**-2)) / 2, log(total)
    losses, report = MaskedVisualCodes(scale=2.0)(model, batch)
    assert losses[NAME].item() == pytest.approx((first + second) / 2, rel=1e-5) and not report
    assert batch.counts[NAME] == 2


def test_cells_of_a_picture_share_its_weight():
    layout = vk.SegmentLayout([[4], [2]])
    hidden = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    torch.testing.assert_close(shares(hidden, layout), torch.tensor([1 / 3, 0, 1 / 3, 1 / 3, 0, 1]))


def test_without_a_scale_the_best_prediction_costs_much():
    """Its state is the code, and all other codes are opposite."""
    code = torch.eye(4)[:1]
    loss = vk.linear_cross_entropy(code, torch.cat((code, -code.repeat(2047, 1))), torch.tensor([0]))
    assert loss.item() == pytest.approx(log(1 + 2047 / e**2), rel=1e-4) and 5.62 < loss < 5.63


def test_a_model_without_codes_is_refused():
    config = table.recipe("soho")
    config.model.joint.image.codes = 0
    with pytest.raises(ValueError, match="hides codes of a visual dictionary: give model.joint.image.codes"):
        MaskedVisualCodes().check(config)


def test_losses_that_share_a_batch_share_the_cells():
    off = "--data.sets=null", "--objectives.random_matching=null"
    config = table.recipe("soho", "--tiny=true", "--model.joint.image.max_grid=[2,2]", *off)
    objectives, samples = config.objectives.active, [picture() for _ in range(3)]
    tokenizer = SimpleNamespace(mask_id=3, ordinary_ids=np.arange(4, 30))
    for number, sample in enumerate(samples):
        sample.text = Words(np.arange(4, 9), np.arange(5))
        for objective in objectives.values():
            objective.prepare(sample, Draw(tokenizer, lambda number=number: generator(number, 0, 0, 1)))
    model, calls = build_model(config, 40), []
    model.joint.image.backbone.register_forward_hook(lambda *_: calls.append(1))
    total, losses, _ = PretrainingModule(model, objectives)(collate(samples, range(3)))
    assert losses.keys() == {"masked_language", NAME} and len(calls) == 1
    total.backward()
    assert model.joint.image.mask_row.grad.any() and model.joint.image.backbone.conv1.weight.grad.any()
