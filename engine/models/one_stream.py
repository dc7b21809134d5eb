"""One stream: UNITER's single transformer over the words and the regions of each pair."""

from __future__ import annotations

import itertools

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.batch import IMAGE, TEXT, Batch
from engine.models.base import VisionLanguageModel
from engine.models.embedders import RegionRows, TextTables
from engine.models.heads import MaskedLanguageHead, RegionClassHead, RegionFeatureHead
from engine.models.initialization import initialize
from engine.models.transformer import PackedTransformer, Tokens
from engine.sections import JointStack


class OneStream(VisionLanguageModel):
    """Words and regions are embedded straight into one packed stream, and every token sees its whole pair.

    Of a pair at most one segment is masked in a pass. Either segment may be empty, for single samples or
    throughout.
    """

    def __init__(
        self,
        stack: JointStack,
        vocab_size: int,
        *,
        feature_values: int,
        classes: int,
        initializer_range: float = 0.02,
        impl: str = "auto",
    ):
        super().__init__(impl)
        streams = itertools.count()
        width, head = stack.width, (stack.activation, stack.eps, impl)
        self.text_embedder = TextTables(stack, vocab_size)
        self.region_embedder = RegionRows(stack, feature_values, impl)
        self.eps, self.dropout, self.embedding_stream = stack.eps, stack.dropout, next(streams)
        self.transformer = PackedTransformer(stack, streams, impl=impl)
        self.pooler = nn.Linear(width, width)
        self.masked_language_head = MaskedLanguageHead(width, width, vocab_size, *head)
        self.region_feature_head = RegionFeatureHead(width, feature_values, *head)
        self.region_class_head = RegionClassHead(width, classes, *head)
        self.matching_head = nn.Linear(width, 2)
        initialize(self, initializer_range)

    @property
    def words(self) -> Tensor:
        return self.text_embedder.words

    def encode(self, batch: Batch, masked: int | None = None) -> Tokens:
        """States over `batch.layout`; `masked` is the segment, TEXT or IMAGE, that is read after
        corruption."""
        return self._once(batch, f"encode {masked}", lambda: self._encode(batch, masked))

    def encode_masked_words(self, batch: Batch) -> Tokens:
        return self.encode(batch, masked=TEXT)

    def pooled(self, tokens: Tokens) -> Tensor:
        """`[B, D]`: what a pair's first token says of the pair."""
        first = vk.take_rows(tokens.hidden, tokens.layout.starts[:, 0], impl=self.impl)
        return torch.tanh(self.pooler(first))

    def matching_logits(self, tokens: Tokens) -> Tensor:
        """`[B, 2]`: the image was replaced, it is the caption's own."""
        return self.matching_head(self.pooled(tokens))

    def region_features(self, hidden: Tensor) -> Tensor:
        """`[M, F]`: features predicted from the states of regions."""
        return self.region_feature_head.features(hidden, self.region_embedder.feature_projection.weight)

    def _encode(self, batch: Batch, masked: int | None) -> Tokens:
        hidden = self._embed(batch, masked)
        return self.transformer(Tokens(hidden, batch.layout), rng=self.rng)

    def _embed(self, batch: Batch, masked: int | None) -> Tensor:
        """`[num_tokens, D]`: dropout(LN(word + position + type)) and dropout(LN(region + type)), each segment
        with a norm of its own."""
        text, regions, layout = self.text_embedder, self.region_embedder, batch.layout
        ids = batch.masked_words.ids if masked == TEXT else batch.text_ids
        hidden_regions = batch.masked_regions.places.rows(batch.image_layout) if masked == IMAGE else None
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
