"""Where words lie on a page: tables of the edges and sides of their boxes."""

from __future__ import annotations

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.models.embedding.rows import table

COORDINATES = 1024
"""Rows of every table: coordinates are 0..1000."""


class PageTables(nn.Module):
    """One table for x0 and x1, one for y0 and y1, one for heights, one for widths."""

    def __init__(self, coordinate_width: int, side_width: int):
        super().__init__()
        self.x, self.y = table(COORDINATES, coordinate_width), table(COORDINATES, coordinate_width)
        self.heights, self.widths = table(COORDINATES, side_width), table(COORDINATES, side_width)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """In the order of `columns`."""
        return self.x, self.y, self.x, self.y, self.heights, self.widths

    @staticmethod
    def columns(boxes: Tensor) -> Tensor:
        """int32 `[n, 6]`: x0, y0, x1, y1, height, width of boxes `[n, 4]` (x0, y0, x1, y1)."""
        return torch.cat((boxes, boxes[:, 3:] - boxes[:, 1:2], boxes[:, 2:3] - boxes[:, :1]), dim=1)


class SummedPage(PageTables):
    """LayoutLM's: six rows as wide as the stream, summed with the word's."""

    def __init__(self, width: int):
        super().__init__(width, width)


class ConcatenatedPage(PageTables):
    """LayoutLMv2's: six rows side by side, each a sixth of the stream's width; sides take what does not divide."""

    def __init__(self, width: int, impl: str):
        super().__init__(width // 6, (width - 4 * (width // 6)) // 2)
        self.impl = impl

    def forward(self, boxes: Tensor) -> Tensor:
        """`[n, D]`."""
        ids = self.columns(boxes).unbind(1)
        rows = [vk.take_rows(t, column, impl=self.impl) for t, column in zip(self.tables, ids, strict=True)]
        return torch.cat(rows, dim=1)
