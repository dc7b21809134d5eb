"""The tools that judge the ops are judged first."""

import pytest
import torch

from vlkernels.core.spec import Case
from vlkernels.testing import error_rule, sync_lint


def test_the_rule_allows_twice_the_eager_error_and_a_few_ulps():
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = truth.float() + torch.tensor([0.0, 1e-5])
    error_rule.assert_close("x", truth.float() + torch.tensor([1.9e-5, 0.0]), eager, truth)
    with pytest.raises(AssertionError, match="x: error 2.5"):
        error_rule.assert_close("x", truth.float() + torch.tensor([2.5e-5, 0.0]), eager, truth)


def test_infinities_must_agree():
    truth = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    error_rule.assert_close("lse", truth.float(), truth.float(), truth)
    for wrong in (float("inf"), float("nan"), 0.0):
        with pytest.raises(AssertionError):
            error_rule.assert_close("lse", torch.tensor([1.0, wrong]), truth.float(), truth)


def test_dtype_and_shape_are_part_of_the_rule():
    truth = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="dtype"):
        error_rule.assert_close("x", truth.half(), truth.float(), truth)
    with pytest.raises(AssertionError, match="shape"):
        error_rule.assert_close("x", truth.float()[:2], truth.float(), truth)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x if (x > 0).any() else -x,
        lambda x: x.nonzero().float(),
        lambda x: torch.tensor(x.tolist()),
    ],
    ids=["item", "boolean index", "if", "nonzero", "tolist"],
)
def test_the_lint_catches_syncs(waits):
    case = Case("plain", lambda fill: {"x": fill.normal(4)})
    with pytest.raises(Exception):
        sync_lint.lint(waits, case)


def test_the_lint_passes_code_without_syncs():
    sync_lint.lint(lambda x: (x * 2).sum(), Case("plain", lambda fill: {"x": fill.normal(4)}))


def test_a_case_in_which_eager_overflows_proves_nothing():
    truth = torch.tensor([1e30], dtype=torch.float64)
    with pytest.raises(AssertionError, match="proves nothing"):
        error_rule.assert_close("x", torch.tensor([float("nan")]), torch.tensor([float("inf")]), truth)
