"""Codebook and batch norms of a real recipe: two ranks under ZeRO 2 and 3 are one plain process, and resume exactly."""

from pathlib import Path

import pytest
import soho_curves
import torch
from launch import run
from shared_cache import shared_cache

WORKER = Path(__file__).with_name("soho_worker.py")
BOOK = "joint.image.dictionary.codebook."
__all__ = ["shared_cache"]


@pytest.fixture(scope="module")
def points(shared_cache, tmp_path_factory):
    """Of one process; and by rank and stage, of two."""
    expected, folder = soho_curves.plain_points(shared_cache), tmp_path_factory.mktemp("soho")
    for rank in run([WORKER, shared_cache, folder], world=2, timeout=120):
        assert rank.code == 0, rank.err[-4000:]
    return expected, [torch.load(folder / f"found_by_{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("stage", soho_curves.STAGES)
def test_losses_and_states_are_those_of_one_process(points, stage):
    expected, ranks = points
    for found, _ in (rank[stage] for rank in ranks):
        for step, ((losses, states), (own_losses, own_states)) in enumerate(zip(expected, found, strict=True)):
            assert own_losses == pytest.approx(losses, rel=1e-5), step
            assert own_states.keys() == states.keys()
            for name, value in states.items():
                torch.testing.assert_close(own_states[name], value, rtol=1e-4, atol=2e-5, msg=lambda m: f"{step} {name}: {m}")


@pytest.mark.parametrize("stage", soho_curves.STAGES)
def test_ranks_hold_the_same_bits_and_resume_to_the_same_bits(points, stage):
    (first, resumed), (second, resumed_second) = (rank[stage] for rank in points[1])
    for name, value in first[-1][1].items():
        for other in (second[-1][1], resumed, resumed_second):
            assert torch.equal(value, other[name]), name


def test_all_three_losses_were_had_and_the_states_move(points):
    """What stands still would pass above, were it left out of both."""
    expected, _ = points
    assert {name for losses, _ in expected for name in losses} == {"masked_language", "masked_visual_codes", "random_matching"}
    (_, first), *_, (_, last) = expected
    statistics = "joint.image.backbone.bn1.running_var", "joint.image.dictionary.norm.running_mean"
    for name in (BOOK + "codes", BOOK + "counts", *statistics):
        assert not torch.equal(first[name], last[name]), name
    assert last[BOOK + "steps"].item() == soho_curves.STEPS
    assert (last[BOOK + "counts"] > 0.1).sum() > 3, "several codes are chosen"
