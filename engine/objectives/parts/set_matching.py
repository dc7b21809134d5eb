"""Which prediction is compared with which target, where neither have an order: all pictures at once, on their device."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def cheapest_matching(costs: Tensor, counts: Tensor) -> Tensor:
    """int64 `[B, N]`: a column for each of the first `counts[b]` rows of `costs[b]` `[N, Q]`, all different, so that their
    costs have the least sum; what stands for further rows means nothing. No more rows than columns.

    Exact (Kuhn, 1955, by shortest paths): one row after another joins along the cheapest chain of exchanges, in at most as
    many passes as rows are there; no pass looks at a value, so nothing waits for the device.
    """
    assert costs.shape[1] <= costs.shape[2], costs.shape
    matching = _Matching(costs)
    for row in range(costs.shape[1]):
        matching.add(row, counts > row)
    return matching.columns


class _Matching:
    """The cheapest one of some rows; prices are such that no exchange among these gains anything."""

    def __init__(self, costs: Tensor) -> None:
        pictures, rows, columns = costs.shape
        self.picture = torch.arange(pictures, device=costs.device)
        self.left = costs
        """Costs less the prices of row and column: none is below 0, those of pairs are 0."""
        self.columns = torch.zeros(pictures, rows, dtype=torch.int64, device=costs.device)
        """Of every row."""
        self.owners = torch.full((pictures, columns), -1, device=costs.device)
        """Row of every column; -1: none."""

    def add(self, row: int, joins: Tensor) -> None:
        """Of the pictures where it `joins`, bool `[B]`."""
        end, before, length, gained = self._search(row, joins)
        self._reprice(row, length, gained)
        self._exchange(row, joins, end, before)

    def _search(self, row: int, joins: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The nearest column `[B]` without a row, by chains of rows that give up their columns; the row that each column is
        reached from; how far the end is, and how much nearer each column on the way."""
        reached = torch.full_like(self.left[:, 0], torch.inf)
        before, seen = torch.full_like(self.owners, row), torch.zeros_like(self.owners, dtype=torch.bool)
        length, end, here = torch.zeros_like(reached[:, 0]), torch.zeros_like(self.picture), torch.full_like(self.picture, row)
        every = torch.arange(seen.shape[1], device=seen.device)
        for _ in range(row + 1):
            further = length[:, None] + self.left[self.picture, here]
            nearer = joins[:, None] & ~seen & (further < reached)
            reached, before = torch.where(nearer, further, reached), torch.where(nearer, here[:, None], before)
            nearest, column = reached.masked_fill(seen, torch.inf).min(1)
            length, end = torch.where(joins, nearest, length), torch.where(joins, column, end)
            seen = seen | (joins[:, None] & (every == column[:, None]))
            owner = self.owners[self.picture, column]
            joins = joins & (owner >= 0)
            here = torch.where(joins, owner, here)
        return end, before, length, torch.where(seen, length[:, None] - reached, 0.0)

    def _reprice(self, row: int, length: Tensor, gained: Tensor) -> None:
        """Rows on the way pay more and their columns cost as much less, so that all pairs on it stand at 0."""
        of_rows = torch.zeros_like(self.left[:, :, 0]).scatter_add(1, self.owners.clamp(min=0), gained)
        of_rows[:, row] += length
        self.left = self.left - of_rows[:, :, None] + gained[:, None, :]

    def _exchange(self, row: int, joins: Tensor, column: Tensor, before: Tensor) -> None:
        """Every row on the way takes the column that it was left for, from the end back to the new row."""
        for _ in range(row + 1):
            here = before[self.picture, column]
            given_up = self.columns[self.picture, here]
            self.columns[self.picture, here] = torch.where(joins, column, given_up)
            self.owners[self.picture, column] = torch.where(joins, here, self.owners[self.picture, column])
            joins = joins & (here != row)
            column = torch.where(joins, given_up, column)
