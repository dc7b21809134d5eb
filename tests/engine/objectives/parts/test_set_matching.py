"""The cheapest matching against all there are."""

import itertools

import pytest
import torch

from engine.objectives.parts.set_matching import cheapest_matching


def test_the_second_best_for_one_may_be_best_for_all():
    """Either row likes column 0 best; the row that would lose more has it."""
    costs = torch.tensor([[[1.0, 2, 9], [1, 9, 9]]])
    assert cheapest_matching(costs, torch.tensor([2])).tolist() == [[1, 0]]


def test_a_chain_of_exchanges():
    """The last row takes column 0, whose row takes column 1, whose row takes column 2."""
    costs = torch.tensor([[[0.0, 1, 9, 9], [9, 0, 1, 9], [0, 9, 9, 5]]])
    assert cheapest_matching(costs, torch.tensor([3])).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("ties", [False, True])
def test_no_other_matching_is_cheaper(ties):
    torch.manual_seed(0)
    for rows in (1, 2, 3, 5, 6):
        costs = torch.randint(-3, 4, (24, rows, 6)).double() if ties else torch.randn(24, rows, 6, dtype=torch.float64)
        counts = torch.randint(0, rows + 1, (24,))
        for one, count, columns in zip(costs, counts.tolist(), cheapest_matching(costs, counts).tolist(), strict=True):
            total = lambda chosen, one=one: sum(one[row, column].item() for row, column in enumerate(chosen))  # noqa: E731
            assert len({*columns[:count]}) == count
            best = min(map(total, itertools.permutations(range(6), count)))
            assert total(columns[:count]) == pytest.approx(best, abs=1e-9)


def test_pictures_do_not_meet():
    torch.manual_seed(1)
    costs, counts = torch.randn(6, 4, 7), torch.tensor([4, 0, 3, 1, 4, 2])
    together = cheapest_matching(costs, counts)
    for number, count in enumerate(counts.tolist()):
        alone = cheapest_matching(costs[number : number + 1, :count], counts[number : number + 1])
        assert together[number, :count].tolist() == alone[0].tolist()


def test_nothing_is_looked_at():
    """On tensors without data a look raises, as it waits on a device."""
    costs, counts = torch.empty(3, 4, 5, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    assert cheapest_matching(costs, counts).shape == (3, 4)
    assert cheapest_matching(costs[:, :0], counts).shape == (3, 0)
