"""Rows that no data is needed for: queries, prompts."""

from __future__ import annotations

import torch
import vlkernels as vk
from torch import nn

from engine.models.embedding.rows import Rows, table


class LearnedEmbedder(nn.Module):
    """`count` rows that every sample begins with: Q-Former's queries, prompt tuning's prompts."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.learned = table(count, width)

    def rows(self, layout: vk.SegmentLayout, norm: vk.FusedLayerNorm | None = None) -> Rows:
        """Of the samples of a layout, `count` for each."""
        count = torch.arange(len(self.learned), dtype=torch.int32, device=layout.device)
        return Rows((self.learned,), count.repeat(layout.num_samples)[:, None], norm=norm)
