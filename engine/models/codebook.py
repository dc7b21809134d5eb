"""SOHO's visual dictionary: codes that are moving averages of what chose them."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.states import Float32Buffers, sum_over_ranks


class Codebook(Float32Buffers):
    """The nearest of `num_codes` codes by Euclidean distance, in place of every row.

    After step t, from 1, the averages of how many rows chose a code and of their sum decay by min(t * growth, max_decay);
    a code is their quotient, the counts Laplace-smoothed. A step's rows all meet the codes that stood before the step:
    the published code updates them between the choice and the look-up, which micro-batches and ranks would tell.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    steps: Tensor

    def __init__(
        self, num_codes: int, width: int, *, growth: float = 0.4, max_decay: float = 0.99, smoothing: float = 1e-5
    ):
        super().__init__()
        self.growth, self.max_decay, self.smoothing = growth, max_decay, smoothing
        self.register_buffer("codes", torch.randn(num_codes, width))
        self.register_buffer("counts", torch.zeros(num_codes, 1))
        self.register_buffer("sums", torch.zeros(num_codes, width))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self._chosen: Tensor | None = None

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, width]` codes, through which gradients pass as if they were `rows`; int64 `[N]` which."""
        index = self.nearest(rows)
        if self.training and torch.is_grad_enabled():  # a reading without a graph is followed by one with it
            self._collect(rows.detach(), index)
        codes = self.codes[index].to(rows.dtype)
        return rows + (codes - rows).detach(), index

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """int64 `[N]`: the first of the nearest codes."""
        squares = self.codes.square().sum(1)
        return torch.addmm(squares, rows.to(self.codes.dtype), self.codes.T, alpha=-2).argmin(1)

    def _collect(self, rows: Tensor, index: Tensor) -> None:
        """Sum and number of the rows of every code. Adding by sorted index is the same in every run."""
        if self._chosen is None:
            self._chosen = torch.cat((torch.zeros_like(self.sums), torch.zeros_like(self.counts)), dim=1)
        counted = torch.cat((rows.to(self.sums.dtype), self.counts.new_ones(len(rows), 1)), dim=1)
        self._chosen.index_put_((index,), counted, accumulate=True)

    @torch.no_grad()
    def after_step(self, applied: bool) -> None:
        chosen, self._chosen = self._chosen, None
        if not applied or chosen is None:
            return
        sums, counts = sum_over_ranks(chosen).split((self.sums.shape[1], 1), dim=1)
        self.steps.add_(1)
        decay = (self.steps * self.growth).clamp(max=self.max_decay).to(sums.dtype)
        self.sums.lerp_(sums, 1 - decay)
        self.counts.lerp_(counts, 1 - decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.smoothing) / (total + len(self.counts) * self.smoothing) * total
        self.codes.copy_(self.sums / smoothed)
