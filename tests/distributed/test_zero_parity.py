"""1 and 2 processes x ZeRO 0-3: gradients and losses are those of plain PyTorch on the concatenated batch."""

import json
from pathlib import Path

import pytest
import torch
from launch import run
from standin import StandInModule, small_config, stream

from engine.training.step import normalizers

WORKER = Path(__file__).with_name("zero_worker.py")
STEPS = 4
KINDS = {
    "whole": {"accumulation": 1, "alternate": False},
    "accumulated": {"accumulation": 2, "alternate": False},
    "alternating": {"accumulation": 1, "alternate": True},
}
CASES = {
    f"{stage} {kind}": {"stage": stage, "steps": STEPS, **options}
    for stage in range(4)
    for kind, options in KINDS.items()
}


def plain_curve(alternate: bool) -> list[dict]:
    """The definition: one process, one batch, torch's SGD."""
    config = small_config()
    module = StandInModule()
    optimizer = torch.optim.SGD(module.parameters(), lr=config.optimizer.lr)
    points = []
    windows = stream(config, alternate=alternate)
    for _ in range(STEPS):
        (batch,) = next(windows)
        batch.normalizers = normalizers(batch.counts, 1, torch.device("cpu"))
        loss, _, _ = module(batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
        optimizer.step()
        module.model.rng.advance()
        weights = {name: p.flatten().tolist() for name, p in module.named_parameters()}
        points.append({"loss": loss.item(), "weights": weights, "gradient_norm": norm.item()})
    return points


@pytest.fixture(scope="module")
def curves():
    """Every case on 1 and on 2 ranks, all in one start of the processes."""
    command = [WORKER, json.dumps(CASES)]
    return {world: [rank.result() for rank in run(command, world, timeout=120)] for world in (1, 2)}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_single_process_step(curves, world, case):
    expected = plain_curve(CASES[case]["alternate"])
    for rank in range(world):
        for step, (point, truth) in enumerate(zip(curves[world][rank][case], expected, strict=True)):
            assert point["loss"] == pytest.approx(truth["loss"], rel=1e-6), (rank, step)
            assert point["gradient_norm"] == pytest.approx(truth["gradient_norm"], rel=1e-5), (rank, step)
            for name, weights in truth["weights"].items():
                # SGD without momentum: equal weights after every step are equal gradients in every step
                difference = (torch.tensor(point["weights"][name]) - torch.tensor(weights)).abs().max().item()
                assert difference < 2e-6, (rank, step, name, difference)
