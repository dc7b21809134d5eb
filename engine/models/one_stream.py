"""One stream: UNITER's single transformer over the words and the regions of each pair."""

from __future__ import annotations

import itertools

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.batch import IMAGE, TEXT, Batch, MaskedRegions, MaskedWords
from engine.models.base import VisionLanguageModel
from engine.models.embedders import RegionRows, TextTables
from engine.models.initialization import initialize
from engine.models.transformer import PackedTransformer, SelectedRows, Tokens
from engine.sections import JointStack, Regions


class OneStream(VisionLanguageModel):
    """Words and regions are embedded straight into one packed stream, and every token sees its whole pair.

    Of a pair at most one segment is masked in a pass. Either segment may be empty, for single samples or
    throughout.
    """

    def __init__(
        self,
        stack: JointStack,
        vocab_size: int,
        regions: Regions,
        *,
        initializer_range: float = 0.02,
        impl: str = "auto",
    ):
        super().__init__(impl, initializer_range)
        streams = itertools.count()
        self.stack, self.regions = stack, regions
        self.text_embedder = TextTables(stack, vocab_size)
        self.region_embedder = RegionRows(stack, regions.feature_values, impl)
        self.eps, self.dropout, self.embedding_stream = stack.eps, stack.dropout, next(streams)
        self.transformer = PackedTransformer(stack, streams, impl=impl)
        self.pooler = nn.Linear(stack.width, stack.width)
        self.heads = nn.ModuleDict()
        initialize(self, initializer_range)

    @property
    def words(self) -> Tensor:
        return self.text_embedder.words

    @property
    def last_stack(self) -> JointStack:
        return self.stack

    def encode(self, batch: Batch, view: str | None = None) -> Tokens:
        """States over `batch.layout`, of what is there or of what a view has left of it."""
        return self._once(batch, f"encode {view}", lambda: self._encode(batch, view))

    def masked_states(self, batch: Batch, view: str) -> Tensor:
        """Those of the other tokens are never computed."""
        masked = batch.views[view]
        segment = TEXT if isinstance(masked, MaskedWords) else IMAGE
        places = masked.places
        selected = SelectedRows.of(places.rows(batch.layout, segment), places.samples, batch.layout)
        return self._once(batch, f"masked {view}", lambda: self._encode(batch, view, selected)).hidden

    def pooled(self, tokens: Tokens) -> Tensor:
        """`[B, D]`: what a pair's first token says of the pair."""
        first = vk.take_rows(tokens.hidden, tokens.layout.starts[:, 0], impl=self.impl)
        return torch.tanh(self.pooler(first))

    def _encode(self, batch: Batch, view: str | None, selected: SelectedRows | None = None) -> Tokens:
        hidden = self._embed(batch, None if view is None else batch.views[view])
        return self.transformer(Tokens(hidden, batch.layout), rng=self.rng, selected=selected)

    def _embed(self, batch: Batch, masked: MaskedWords | MaskedRegions | None) -> Tensor:
        """`[num_tokens, D]`: dropout(LN(word + position + type)) and dropout(LN(region + type)), each segment
        with a norm of its own."""
        text, regions, layout = self.text_embedder, self.region_embedder, batch.layout
        ids = masked.ids if isinstance(masked, MaskedWords) else batch.text.ids
        hides_regions = isinstance(masked, MaskedRegions)
        hidden_regions = masked.places.rows(batch.image_layout) if hides_regions else None
        rows = regions(batch.image, hidden_regions)
        segment = layout.token_segment()
        return vk.embed_layer_norm(
            self._table_rows(ids, layout),
            [*text.tables, rows],
            torch.stack((text.weight, regions.weight)),
            bias=torch.stack((text.bias, regions.bias)),
            norm_ids=segment,
            eps=self.eps,
            dropout_p=self.dropout if self.training else 0.0,
            layout=layout,
            rng=self.rng,
            stream=self.embedding_stream,
            impl=self.impl,
        )

    def _table_rows(self, ids: Tensor, layout: vk.SegmentLayout) -> Tensor:
        """int32 `[num_tokens, 4]`: each token's word, position, type and region; -1 where it has none."""
        segment = layout.token_segment()
        is_text, is_region = segment == TEXT, segment == IMAGE
        num_regions = layout.segment_totals[IMAGE]
        regions = torch.arange(num_regions, dtype=torch.int32, device=ids.device)
        streams = (ids.to(torch.int32), regions)
        own = vk.put_segments(streams, layout, ((TEXT,), (IMAGE,)), impl=self.impl)
        position = torch.where(is_text, layout.token_position(), -1)
        columns = torch.where(is_text, own, -1), position, segment, torch.where(is_region, own, -1)
        return torch.stack(columns, dim=1)
