"""Where a patch or cell lies in its picture's grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.models.embedding.rows import table
from engine.models.embedding.sinusoids import grid_sinusoids
from engine.sections.inputs import ImageInput


class FactoredPlaces(nn.Module):
    """A table for rows and a table for columns."""

    def __init__(self, grid: tuple[int, int], width: int):
        super().__init__()
        self.rows, self.columns = table(grid[0], width), table(grid[1], width)

    def lookup(self, positions: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Tables, and the ids of positions `[n, 2]` (row, column) in them."""
        return (self.rows, self.columns), positions.to(torch.int32)


class TabledPlaces(nn.Module):
    """A row per place of the largest grid, learned or of sines; before them the class tokens', where there are any."""

    def __init__(self, grid: tuple[int, int], width: int, *, learned: bool, class_tokens: int):
        super().__init__()
        self.grid_columns, self.first = grid[1], class_tokens
        if learned:
            self.table = table(self.first + grid[0] * grid[1], width)
        else:
            waves = torch.cat((torch.zeros(self.first, width), grid_sinusoids(*grid, width)))
            self.register_buffer("table", waves, persistent=False)

    def lookup(self, positions: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Table, and the ids of positions `[n, 2]` (row, column) in it."""
        ids = positions[:, :1] * self.grid_columns + positions[:, 1:] + self.first
        return (self.table,), ids.to(torch.int32)

    def of_class_tokens(self, count: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """Table, and the ids of class tokens."""
        return (self.table,), torch.arange(self.first, dtype=torch.int32, device=self.table.device).repeat(count)[:, None]


def make_places(options: ImageInput, width: int) -> nn.Module | None:
    """The tables that `positions` asks for; regions have their boxes instead."""
    if options.kind == "regions":
        return None
    grid = tuple(options.max_grid)
    if options.positions == "factored":
        return FactoredPlaces(grid, width)
    if options.positions in ("learned", "sinusoidal"):
        learned = options.positions == "learned"
        return TabledPlaces(grid, width, learned=learned, class_tokens=options.class_tokens)
    return None


def even_grid(count: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """int32 `[count * rows * columns, 2]`: row and column of every cell of `count` pictures."""
    axes = (torch.arange(side, dtype=torch.int32, device=device) for side in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=2).flatten(0, 1).repeat(count, 1)


def boxes_of_cells(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """int32 `[n, 4]`: x0, y0, x1, y1 of cells on a page of 1000 by 1000."""
    row, column = positions[:, :1], positions[:, 1:]
    sides = ((column, grid[1]), (row, grid[0]), (column + 1, grid[1]), (row + 1, grid[0]))
    return torch.cat([index * 1000 // count for index, count in sides], dim=1)
