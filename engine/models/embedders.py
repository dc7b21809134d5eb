"""Embedders: ids, image patches and regions become rows of a packed stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.sections import Stack


class Embedder(nn.Module):
    """LayerNorm and dropout of a sum of table rows and, with `dense`, of rows computed from data: one fused
    call."""

    def __init__(self, stack: Stack, table_sizes: Sequence[int], streams: Iterator[int], impl: str):
        super().__init__()
        self.tables = nn.ParameterList(torch.empty(size, stack.width) for size in table_sizes)
        self.weight = nn.Parameter(torch.ones(stack.width))
        self.bias = nn.Parameter(torch.zeros(stack.width))
        self.eps = stack.eps
        self.dropout = stack.dropout
        self.stream = next(streams)
        self.impl = impl

    def embed(
        self, ids: Tensor, layout: vk.SegmentLayout, rng: vk.Rng | None, dense: Tensor | None = None
    ) -> Tensor:
        """`ids` `[num_tokens, C]`: column c chooses rows of table c."""
        return vk.embed_layer_norm(
            ids,
            list(self.tables),
            self.weight,
            bias=self.bias,
            dense=dense,
            eps=self.eps,
            dropout_p=self.dropout if self.training else 0.0,
            layout=layout,
            rng=rng,
            stream=self.stream,
            impl=self.impl,
        )


class TextEmbedder(Embedder):
    """BERT's: word and position tables."""

    def __init__(self, stack: Stack, vocab_size: int, max_positions: int, streams: Iterator[int], impl: str):
        super().__init__(stack, (vocab_size, max_positions), streams, impl)

    @property
    def words(self) -> Tensor:
        """The word table `[V, D]`, which the masked-language decoder shares."""
        return self.tables[0]

    def forward(self, ids: Tensor, layout: vk.SegmentLayout, rng: vk.Rng | None) -> Tensor:
        position = layout.token_position()
        return self.embed(torch.stack((ids.to(position.dtype), position), dim=1), layout, rng)


class PatchEmbedder(Embedder):
    """ViT's: a linear map of each patch (a convolution of stride `patch`), and tables for its row and
    column."""

    def __init__(
        self, stack: Stack, patch_values: int, max_grid: tuple[int, int], streams: Iterator[int], impl: str
    ):
        super().__init__(stack, max_grid, streams, impl)
        self.projection = nn.Linear(patch_values, stack.width)

    def forward(
        self, patches: Tensor, positions: Tensor, layout: vk.SegmentLayout, rng: vk.Rng | None
    ) -> Tensor:
        """`patches` `[num_tokens, values]`, `positions` `[num_tokens, 2]` (row, column)."""
        dense = self.projection(patches.to(self.projection.weight.dtype))
        return self.embed(positions, layout, rng, dense)


class RegionEmbedder(Embedder):
    """UNITER's: normalised maps of a detector's feature and of the box (x1, y1, x2, y2, w, h, w * h), and a
    type."""

    BOX_VALUES = 7

    def __init__(self, stack: Stack, feature_values: int, streams: Iterator[int], impl: str):
        super().__init__(stack, (1,), streams, impl)
        self.feature_projection = nn.Linear(feature_values, stack.width)
        self.feature_norm = vk.FusedLayerNorm(stack.width, stack.eps)
        self.box_projection = nn.Linear(self.BOX_VALUES, stack.width)
        self.box_norm = vk.FusedLayerNorm(stack.width, stack.eps)

    def forward(
        self, features: Tensor, boxes: Tensor, layout: vk.SegmentLayout, rng: vk.Rng | None
    ) -> Tensor:
        """`features` `[num_tokens, values]`, `boxes` `[num_tokens, 7]` in shares of the image."""
        dense = self.feature_norm(self.feature_projection(features), impl=self.impl)
        dense = self.box_norm(self.box_projection(boxes), impl=self.impl) + dense
        kind = torch.zeros(len(features), 1, dtype=torch.int32, device=features.device)
        return self.embed(kind, layout, rng, dense)
