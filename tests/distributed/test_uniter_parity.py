"""1 and 2 processes x ZeRO 0-3 x accumulation: UNITER's losses and gradients are those of plain PyTorch."""

from pathlib import Path

import pytest
import torch
import uniter_curves
from launch import run
from process_group import process_group_of_one
from shared_cache import shared_cache
from uniter_curves import ACCUMULATIONS, RATES, STAGES, STEPS

WORKER = Path(__file__).with_name("uniter_worker.py")
__all__ = ["process_group_of_one", "shared_cache"]
WORLDS = (1, 2)


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> Path:
    """The file that other processes read it from."""
    return tmp_path_factory.mktemp("uniter") / "truth.pt"


@pytest.fixture(scope="module")
def plain(shared_cache, truth) -> list[dict]:
    curve = uniter_curves.plain_curve(str(shared_cache))
    torch.save(curve, truth)
    return curve


@pytest.fixture(scope="module")
def by_world(shared_cache, truth, plain) -> dict[int, list[dict]]:
    """The curves of every rank: one process is this one, two are started."""
    two = [rank.result() for rank in run([WORKER, shared_cache, truth], world=2, timeout=200)]
    return {1: [uniter_curves.zero_curves(str(shared_cache), plain)], 2: two}


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_uniter_learns_as_one_process_without_deepspeed(plain, by_world, world, stage, accumulation):
    """All four tasks, dropout, ragged batches, ranks and micro-steps of unevenly many samples."""
    for rank in range(world):
        points = by_world[world][rank][f"{stage} {accumulation}"]
        for step, (truth, point) in enumerate(zip(plain, points, strict=True)):
            assert point["losses"] == pytest.approx(truth["losses"], rel=1e-5), (rank, step)
            assert point["largest error"] < 1, (rank, step, point)


def test_the_steps_have_all_tasks_and_uneven_parts(plain, by_world):
    assert len(plain) == 2 * STEPS
    for task in RATES:
        assert sum(task in point["losses"] for point in plain) == 2
    ranks = [by_world[2][rank]["3 6"] for rank in range(2)]
    parts = [[part for rank in ranks for part in rank[step]["parts"]] for step in range(2 * STEPS)]
    assert any(len({part["pairs"] for part in step}) > 1 for step in parts)
    for count in ("masked_language", "masked_region_features"):
        nothing_masked = [part[count] == 0 for step in parts[STEPS:] for part in step if count in part]
        assert any(nothing_masked) and not all(nothing_masked)


def test_a_task_moves_its_own_head_and_no_other(plain):
    for point in plain:
        moved = {name for name, change in point["changes"].items() if change.any()}
        for task in RATES:
            assert any(f".heads.{task}." in name for name in moved) == (task in point["losses"]), (task, point["losses"])


def test_every_parameter_has_a_gradient_in_some_step(plain):
    moved = {name for point in plain for name, change in point["changes"].items() if change.any()}
    assert plain[0]["changes"].keys() - moved == set()
