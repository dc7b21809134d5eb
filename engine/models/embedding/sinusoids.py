"""Positions that are not learned: sines and cosines of geometric frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST_WAVE = 10_000.0


def sinusoids(positions: Tensor, width: int, *, interleaved: bool) -> Tensor:
    """float32 `[n, width]`, frequencies falling from 1 to nearly 1 / 10,000.

    `interleaved`: sine and cosine of a frequency lie side by side (Vaswani et al., 2017); otherwise all sines come
    first (MAE's two-dimensional table is made of such halves).
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    angles = positions.double()[:, None] * LONGEST_WAVE**-exponents
    waves = torch.stack((angles.sin(), angles.cos()), dim=2 if interleaved else 1)
    return waves.flatten(1).float()


def grid_sinusoids(rows: int, columns: int, width: int) -> Tensor:
    """float32 `[rows * columns, width]`: half of each row tells its column in the grid, half its row, as in MAE."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = (sinusoids(axis.flatten(), width // 2, interleaved=False) for axis in (column, row))
    return torch.cat(tuple(halves), dim=1)
