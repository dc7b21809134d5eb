"""Embedders: ids, image patches and regions become rows of a packed stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.batch import Regions
from engine.sections import JointStack, Stack

TYPES = 2
"""Rows of UNITER's type table: one per segment of a pair."""


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


class TextTables(nn.Module):
    """UNITER's for words: word, position and type tables, and the norm of their sum."""

    def __init__(self, stack: JointStack, vocab_size: int):
        super().__init__()
        sizes = (vocab_size, stack.max_positions, TYPES)
        self.tables = nn.ParameterList(torch.empty(size, stack.width) for size in sizes)
        self.weight = nn.Parameter(torch.ones(stack.width))
        self.bias = nn.Parameter(torch.zeros(stack.width))

    @property
    def words(self) -> Tensor:
        """The word table `[V, D]`, which the masked-language decoder shares."""
        return self.tables[0]


class RegionRows(nn.Module):
    """UNITER's for regions: normalised maps of a detector's feature and of the box, and the norm of their sum
    with a type. A masked region shows `mask_row` in place of its feature.

    The published model keeps a second row beside `mask_row`, for regions that are not masked: always zero.
    """

    BOX_VALUES = 7

    def __init__(self, stack: JointStack, feature_values: int, impl: str):
        super().__init__()
        self.feature_projection = nn.Linear(feature_values, stack.width)
        self.feature_norm = vk.FusedLayerNorm(stack.width, stack.eps)
        self.box_projection = nn.Linear(self.BOX_VALUES, stack.width)
        self.box_norm = vk.FusedLayerNorm(stack.width, stack.eps)
        self.mask_row = nn.Parameter(torch.empty(1, feature_values))
        self.weight = nn.Parameter(torch.ones(stack.width))
        self.bias = nn.Parameter(torch.zeros(stack.width))
        self.impl = impl

    def forward(self, regions: Regions, masked: Tensor | None) -> Tensor:
        """`[N, D]` before type and norm; `masked` `[M]` are the regions to hide."""
        dtype = self.mask_row.dtype
        features, boxes = regions.features.to(dtype), regions.boxes.to(dtype)
        if masked is not None:
            features = features.index_put((masked,), self.mask_row.expand(len(masked), -1))
        rows = self.feature_norm(self.feature_projection(features), impl=self.impl)
        return self.box_norm(self.box_projection(boxes), impl=self.impl) + rows
