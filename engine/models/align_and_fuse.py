"""Align and fuse: an image tower, a text tower, and a fusion encoder whose text attends to the image."""

from __future__ import annotations

import enum
import itertools
import math

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.batch import Batch
from engine.models.base import VisionLanguageModel
from engine.models.embedders import PatchEmbedder, TextEmbedder
from engine.models.heads import FeatureHead
from engine.models.initialization import initialize
from engine.models.transformer import PackedTransformer, Source, Tokens
from engine.sections import FusionStack, Model

CHANNELS = 3


class Variant(enum.IntEnum):
    """Passes that run the same layers on the same pair, yet must draw different dropout."""

    PLAIN = 0
    NEGATIVE_TEXT = 1
    NEGATIVE_IMAGE = 2
    MASKED = 3

    def identities(self, sample_ids: Tensor) -> Tensor:
        """Sample ids for `vk.Rng` that no other pass of the step has."""
        return sample_ids * len(Variant) + self


class AlignAndFuse(VisionLanguageModel):
    """Two towers aligned by features of unit length, and a fusion encoder for matching and masked
    language."""

    def __init__(self, config: Model, vocab_size: int, impl: str = "auto"):
        super().__init__(impl, config.initializer_range)
        image, text, fusion = config.image, config.text, config.fusion
        if fusion.width != text.width:
            raise ValueError(
                f"model.fusion.width must be model.text.width = {text.width}, whose stream it goes on with, "
                f"got {fusion.width}"
            )
        streams = itertools.count()
        patch_values = CHANNELS * image.patch_size**2
        self.image_embedder = PatchEmbedder(image, patch_values, tuple(image.max_grid), streams, impl)
        self.image_tower = PackedTransformer(image, streams, impl=impl)
        self.image_head = FeatureHead(image.width, config.projection_dim, impl)
        self.text_embedder = TextEmbedder(text, vocab_size, text.max_positions, streams, impl)
        self.text_tower = PackedTransformer(text, streams, impl=impl)
        self.text_head = FeatureHead(text.width, config.projection_dim, impl)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.logit_scale_init)]))
        self.fusion = PackedTransformer(
            fusion, streams, source_width=image.width, cross_every=fusion.cross_every, impl=impl
        )
        self.fusion_options = fusion
        self.negatives_stream = next(streams)
        self.max_log_scale = math.log(config.logit_scale_max)
        self.heads = nn.ModuleDict()
        initialize(self, config.initializer_range)

    @property
    def words(self) -> Tensor:
        return self.text_embedder.words

    @property
    def last_stack(self) -> FusionStack:
        return self.fusion_options

    # ---- passes over a batch

    def encode_image(self, batch: Batch) -> Tokens:
        """The image tower's states."""
        return self._once(batch, "image", lambda: self._encode_image(batch))

    def encode_text(self, batch: Batch, view: str | None = None) -> Tokens:
        """The text tower's states of the captions, or of the captions after a view's corruption."""
        return self._once(batch, f"text {view}", lambda: self._encode_text(batch, view))

    def masked_states(self, batch: Batch, view: str) -> Tensor:
        read = self.fuse(self.encode_text(batch, view), self.image_source(batch))
        return vk.take_rows(read.hidden, batch.views[view].places.rows(read.layout), impl=self.impl)

    def image_features(self, batch: Batch) -> Tensor:
        """`[B, E]`, unit length."""
        return self._once(batch, "image features", lambda: self.features_of_image(self.encode_image(batch)))

    def text_features(self, batch: Batch) -> Tensor:
        """`[B, E]`, unit length."""
        return self._once(batch, "text features", lambda: self.features_of_text(self.encode_text(batch)))

    def image_source(self, batch: Batch) -> Source:
        """The batch's images as the fusion encoder reads them."""
        return self._once(batch, "image source", lambda: self.source_of(self.encode_image(batch)))

    # ---- the same on states that are there already

    def features_of_image(self, image: Tokens) -> Tensor:
        return self.image_head(image.hidden, image.layout)

    def features_of_text(self, text: Tokens) -> Tensor:
        return self.text_head(text.hidden, text.layout)

    def source_of(self, image: Tokens, index: Tensor | None = None) -> Source:
        """Keys and values of image states, projected once; `index[b]` is the image that text `b` reads."""
        return Source(self.fusion.project_source(image.hidden), image.layout, index)

    def fuse(self, text: Tokens, image: Source) -> Tokens:
        """Text states that have read their images."""
        return self.fusion(text, rng=self.rng, source=image)

    def scale(self) -> Tensor:
        """What multiplies cosine similarities: exp of the parameter, at most `logit_scale_max`."""
        return self.logit_scale.clamp(max=self.max_log_scale).exp()

    def _encode_image(self, batch: Batch) -> Tokens:
        layout = batch.image_layout
        hidden = self.image_embedder(batch.image.values, batch.image.positions, layout, self.rng)
        return self.image_tower(Tokens(hidden, layout), rng=self.rng)

    def _encode_text(self, batch: Batch, view: str | None) -> Tokens:
        variant = Variant.PLAIN if view is None else Variant.MASKED
        layout = batch.text.layout.with_sample_ids(variant.identities(batch.text.layout.sample_ids))
        ids = batch.text.ids if view is None else batch.views[view].ids
        hidden = self.text_embedder(ids, layout, self.rng)
        return self.text_tower(Tokens(hidden, layout), rng=self.rng)
