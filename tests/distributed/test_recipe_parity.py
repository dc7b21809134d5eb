"""Every kind of state that a recipe has: two ranks under ZeRO 2 and 3 are one plain process, within the error rule.

Truth is the plain process in float64, eager the same in float32. What is compared is how every tensor has changed, as a
share of its largest true change, so that the rule's largest error is that of the worst tensor: summing gradients in
another order may cost what float32 costs one process anyway, twice, and no more.
"""

from pathlib import Path

import pytest
import recipe_states
import torch
from launch import run
from recipe_states import KINDS, STAGES
from shared_cache import shared_cache

from vlkernels.testing import error_rule

WORKER = Path(__file__).with_name("recipe_worker.py")
STILL = {
    "frozen": ("image.embedder.", "image.transformer.blocks.", "decoder.embedder.", "decoder.transformer."),
    "queries": ("joint.image.places.", "joint.text.positions", "joint.text.norm."),  # the encoder reads pictures alone
    "codebook": ("heads.masked_language.", "joint.image.places."),  # a step has one of its losses; its places are sines
}
UNMOVED = 0.1
"""A change below this share of the median tensor's is compared with that: keys' biases, for one, have the gradient 0 but for
rounding."""
__all__ = ["shared_cache"]


@pytest.fixture(scope="module")
def ranks(shared_cache, tmp_path_factory) -> Path:
    """Where the states of both ranks are."""
    folder = tmp_path_factory.mktemp("states")
    for finished in run([WORKER, shared_cache, folder], world=2, timeout=220):
        assert finished.code == 0, finished.err
    return folder


@pytest.fixture(scope="module", params=KINDS)
def plain(request, shared_cache) -> tuple[str, dict, dict, dict]:
    """(kind, states at the beginning, and at the end in float64 and in float32)."""
    begun, truth = recipe_states.plain(request.param, str(shared_cache), torch.float64)
    _, eager = recipe_states.plain(request.param, str(shared_cache), torch.float32)
    return request.param, begun, truth, eager


def changes(states: dict, begun: dict, truth: dict) -> torch.Tensor:
    """float32: of all tensors, one behind the other."""
    assert states.keys() == truth.keys()
    largest = {name: (truth[name] - begun[name]).abs().max() for name in truth}
    least = UNMOVED * torch.stack([change for change in largest.values() if change > 0]).median()
    shares = [(states[name].double() - begun[name]) / torch.maximum(largest[name], least) for name in truth]
    return torch.cat([share.flatten() for share in shares])


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_have_the_states_of_one_process(plain, ranks, stage):
    kind, begun, truth, eager = plain
    first, second = (torch.load(ranks / f"{kind}_{stage}_{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    true, ours, theirs = (changes(states, begun, truth) for states in (truth, first, eager))
    error_rule.assert_close(kind, ours.float(), theirs.float(), true)


def test_what_should_move_has_moved_and_nothing_else(plain):
    """What stands still would pass above, were it left out of both."""
    kind, begun, truth, _ = plain
    still = {name for name in truth if torch.equal(truth[name], begun[name])}
    expected = {name for name in truth if name.startswith(STILL.get(kind, ("nothing",)))}
    assert still == expected and bool(expected) == (kind in STILL)


def test_a_gradient_that_is_one_percent_off_in_one_table_is_seen(plain):
    kind, begun, truth, eager = plain
    name = max(truth, key=lambda one: (truth[one] - begun[one]).abs().max())
    wrong = {**eager, name: eager[name] + 0.01 * (eager[name] - begun[name]).float()}
    true, ours, theirs = (changes(states, begun, truth).float() for states in (truth, wrong, eager))
    with pytest.raises(AssertionError, match=f"{kind}: error"):
        error_rule.assert_close(kind, ours, theirs, true.double())
