"""Two uneven ranks under ZeRO 0-3, both exchanges: the parameters move by the gradients of one process."""

from itertools import product
from pathlib import Path

import pytest
import torch
from launch import run
from zero_losses_worker import EXCHANGES, STAGES, one_process

WORKER = Path(__file__).with_name("zero_losses_worker.py")


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return [rank.result() for rank in run([WORKER], world=2, timeout=120)]


def test_parameters_move_by_the_gradients_of_one_process(ranks):
    loss, gradients = one_process()
    assert all(gradient.abs().max() > 1e-2 for gradient in gradients)
    for result, stage, exchange in product(ranks, STAGES, EXCHANGES):
        found = result[f"{stage} {exchange}"]
        assert found["loss"] == pytest.approx(loss, rel=1e-5), (stage, exchange)
        for mine, true in zip(found["gradients"], gradients, strict=True):
            error = (torch.tensor(mine) - true).abs().max() / true.abs().max()
            assert error < 1e-5, (stage, exchange, error)
