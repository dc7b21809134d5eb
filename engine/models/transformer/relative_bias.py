"""Bias by bucketed distances, one for all blocks of a stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.sections import Stack

LEFT, BOTTOM = 0, 3
"""Of a box (x0, y0, x1, y1): what LayoutLMv2's code takes for its x and its y."""


class Distances(nn.Module):
    """A table per coordinate: that of the position in the segment and, where boxes count, of their x and their y."""

    def __init__(self, stack: Stack):
        super().__init__()
        by_box = [] if stack.relative_box is None else [stack.relative_box, stack.relative_box]
        self.buckets = [stack.relative_position, *by_box]
        self.tables = nn.ParameterList(torch.zeros(own.count, stack.heads) for own in self.buckets)

    def forward(self) -> tuple[Tensor, ...]:
        """The tables; copies, because under ZeRO-3 a parameter is empty outside the module that owns it."""
        return tuple(table.clone() for table in self.tables)

    def coordinates(self, position: Tensor, boxes: Tensor | None) -> Tensor:
        """int32 `[num_tokens, C]` of tokens at these positions of their segments."""
        if len(self.buckets) == 1:
            return position[:, None]
        if boxes is None:
            raise ValueError("a stack with relative_box needs the boxes of its tokens, and keeps none of earlier ones")
        return torch.stack((position, boxes[:, LEFT], boxes[:, BOTTOM]), dim=1)

    def bias(
        self, tables: Sequence[Tensor], coordinates: Tensor, kv_coordinates: Tensor | None = None
    ) -> vk.RelativeBias:
        """Of queries and keys at these coordinates; by default keys and queries are the same rows."""
        return vk.RelativeBias(
            coordinates,
            tables,
            num_buckets=[own.count for own in self.buckets],
            max_distance=[own.max_distance for own in self.buckets],
            bidirectional=[own.bidirectional for own in self.buckets],
            kv_coordinates=kv_coordinates,
        )
