"""The model: the roles that a recipe gives it, and passes over batches."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.batch import Batch, HiddenCodes, MaskedWords, Text
from engine.models import sharing
from engine.models.co_attention import CoAttention
from engine.models.embedding import Cells, GridEmbedder, cells_of_one_code
from engine.models.features import FeatureHead, scale_within
from engine.models.initialization import initialize
from engine.models.momentum import MomentumCopy
from engine.models.passes import SharedPasses, drawn_as
from engine.models.roles import Decoder, Fusion, ImageTower, Joint, make_text_tower
from engine.models.transformer import Blocks, SelectedRows, Source, Tokens
from engine.models.views import hidden_rows, text_of
from engine.sections import Model, Regions, Stack

READING = ("joint", "fusion", "text", "decoder")
"""Roles that may read a text, those first that know more of the sample."""
LAST = slice(-1, None)
"""Of the layers of a tower."""


class VisionLanguageModel(SharedPasses, nn.Module):
    """A model that reads batches; `heads` are what the objectives of the run have added, by name.

    `rng` is the state all dropout reads; whoever trains advances it once per optimizer step. `impl` is the
    implementation every op is asked for.
    """

    def __init__(self, options: Model, vocab_size: int, regions: Regions | None = None, impl: str = "auto"):
        super().__init__()
        self.options, self.regions, self.impl, self.vocab_size = options, regions, impl, vocab_size
        self.rng = vk.Rng(0)
        streams = itertools.count()
        values = None if regions is None else regions.feature_values
        image, text = options.image, options.text
        self.image = ImageTower(image, streams, impl, values) if image is not None else None
        self.text = make_text_tower(text, vocab_size, streams, impl) if text is not None else None
        self.fusion = Fusion(options.fusion, image.width, streams, impl) if options.fusion is not None else None
        self.joint = self._make_joint(vocab_size, streams, values)
        self.decoder = self._make_decoder(vocab_size, streams)
        small = options.generator
        self.generator = make_text_tower(small, vocab_size, streams, impl) if small is not None else None
        both = options.co_attention
        self.co_attention = CoAttention(both, image, text, streams, impl) if both is not None else None
        if options.compares_towers:
            self.image_head = FeatureHead(image.width, options.projection_dim, image.projection)
            self.text_head = FeatureHead(text.width, options.projection_dim, text.projection)
            if options.logit_scale_init is not None:
                self.logit_scale = nn.Parameter(torch.tensor([math.log(options.logit_scale_init)]))
        self.negatives_stream = next(streams)
        self.heads = nn.ModuleDict()
        self.teacher: MomentumCopy | None = None
        self.read_whole: dict[str, str] = {}
        """Views of which an objective, by its name, reads every state: one pass then serves those that read some."""
        sharing.share(self, options)
        initialize(self, options.initializer_range, options.initialization)

    def add_head(self, name: str, head: nn.Module) -> None:
        """Initialise and keep a head."""
        initialize(head, self.options.initializer_range, self.options.initialization)
        self.heads[name] = head

    def add_teacher(self, parts: Collection[str]) -> None:
        """Keep a momentum copy of these modules, such as `image` or `heads.masked_language`: a model of its own, without
        the others. None is made of nothing."""
        if not parts:
            return
        taught = copy.copy(self)
        kept = {name: part if name in parts else None for name, part in self._modules.items()}
        heads = {name: head for name, head in self.heads.items() if f"heads.{name}" in parts}
        taught._modules, taught._parameters = {**kept, "heads": nn.ModuleDict(heads)}, {}
        self.teacher = MomentumCopy(taught, self.options.momentum)

    @contextlib.contextmanager
    def passes_shared(self) -> Iterator[None]:
        """Those of the momentum copy too."""
        of_teacher = contextlib.nullcontext() if self.teacher is None else self.teacher.module.passes_shared()
        with super().passes_shared(), of_teacher:
            yield

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Recompute every block in the backward instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.activation_checkpointing = enabled

    @property
    def last_role(self) -> str:
        """The role whose states words are predicted from: the last one that reads a given text."""
        return next(name for name in READING if getattr(self, name) is not None)

    @property
    def last_stack(self) -> Stack:
        """The section of that role."""
        return getattr(self.options, self.last_role)

    @property
    def region_role(self) -> str:
        """The role whose states regions are predicted from."""
        return "joint" if self.joint is not None else "image"

    @property
    def region_stack(self) -> Stack:
        """The section of that role."""
        return getattr(self.options, self.region_role)

    @property
    def words(self) -> Tensor:
        """The word table `[V, D]` that embeds this role's text and decodes its words."""
        return self.words_of(self.last_role)

    def words_of(self, role: str) -> Tensor:
        """The word table of a role; the fusion role has that of the text role."""
        if role == "joint":
            return self.joint.text.words
        return getattr(self, "text" if role == "fusion" else role).embedder.words

    # ---- passes over a batch

    def image_states(self, batch: Batch, view: str | None = None, selected: SelectedRows | None = None) -> Tokens:
        """The image tower's states of the picture, or of what a view leaves of it."""

        def read() -> Tokens:
            if self.co_attention is not None:
                image, _ = self._read_together(batch, view)
                return self.image.transformer(image, rng=self.rng, layers=LAST, selected=selected)
            layout = drawn_as(batch.image_layout, batch, view)
            return self.image(batch.image, layout, self.rng, masked=hidden_rows(batch, view), selected=selected)

        return self._of_all(batch, f"image {view}", selected, read)

    def text_states(self, batch: Batch, view: str | None = None, selected: SelectedRows | None = None) -> Tokens:
        """The text tower's states of the text, or of what a view has made of it."""
        return self._text_states("text", batch, view, selected)

    def generator_states(self, batch: Batch, view: str | None = None, selected: SelectedRows | None = None) -> Tokens:
        """As `text_states`, of the generator."""
        return self._text_states("generator", batch, view, selected)

    def fused_states(self, batch: Batch, view: str | None = None, selected: SelectedRows | None = None) -> Tokens:
        """States of the text beside its image."""

        def read() -> Tokens:
            return self.fuse(self.before_fusion(batch, view), self.image_source(batch), selected)

        return self._of_all(batch, f"fusion {view}", selected, read)

    def joint_states(
        self,
        batch: Batch,
        view: str | None = None,
        selected: SelectedRows | None = None,
        mask: str | None = None,
    ) -> Tokens:
        """States of the joint stream; `mask` names another table than the recipe's."""

        def read() -> Tokens:
            source = self._once(batch, "joint source", lambda: self.joint.source_of(self.image_states(batch))) if reads else None
            return self.joint(
                text,
                self._pictures(batch),
                self._joint_layout(batch, view),
                self.rng,
                image_layout=batch.image_layout,
                masked=self._hidden_tokens(batch, view),
                mask=mask,
                source=source,
                selected=selected,
            )

        text, reads = text_of(batch, view), self.options.joint.source is not None
        return self._of_all(batch, f"joint {view} {mask}", selected, read)

    def decoder_states(
        self, batch: Batch, view: str | None = None, source_view: str | None = None, selected: SelectedRows | None = None
    ) -> Tokens:
        """States of a text that is written, from the states of another role's pass over `source_view`."""

        def read() -> Tokens:
            text = self.begun_with(self.options.decoder.first_token, text_of(batch, view))
            layout = drawn_as(text.layout, batch, view, stage=2)
            return self.decoder(text, layout, self.rng, self._before_writing(batch, source_view), selected)

        return self._of_all(batch, f"decoder {view} {source_view}", selected, read)

    def decoder_source(self, batch: Batch, view: str | None = None) -> Source:
        """Another role's states over a view, as the decoder reads them by cross-attention; projected once."""

        def project() -> Source:
            return self.decoder.source_of(self._states_of(self.options.decoder.source, batch, view))

        return self._once(batch, f"decoder source {view}", project)

    def cells(self, batch: Batch) -> Cells:
        """What the backbone of the joint stream makes of the pictures, for all passes."""
        return self._once(batch, "cells", lambda: self.joint.image.cells(batch.image))

    def hidden_cells(self, batch: Batch, view: str) -> Tensor:
        """bool `[N]`: the cells whose codes a view hides."""
        drawn = batch.views[view].places.rows(batch.image_layout)
        return cells_of_one_code(self.cells(batch).codes, drawn, batch.image_layout)

    def masked_states(self, batch: Batch, view: str) -> Tensor:
        """`[M, D]`: states of the words or regions that a view hides, where all else is read; those of other tokens are
        not computed to the end."""
        return self._once(batch, f"masked {view}", lambda: self._masked_states(batch, view)).hidden

    # ---- what is compared, and what is read

    def image_features(self, batch: Batch) -> Tensor:
        """`[B, E]`, unit length."""
        return self._once(batch, "image features", lambda: self.features_of_image(self.image_states(batch)))

    def text_features(self, batch: Batch) -> Tensor:
        """`[B, E]`, unit length."""
        return self._once(batch, "text features", lambda: self.features_of_text(self.text_states(batch)))

    def features_of_image(self, image: Tokens) -> Tensor:
        return self.image_head(self.image.pooled(image))

    def features_of_text(self, text: Tokens) -> Tensor:
        return self.text_head(self.text.pooled(text))

    def scale(self) -> Tensor:
        """What multiplies cosine similarities."""
        return scale_within(self.logit_scale, self.options.logit_scale_min, self.options.logit_scale_max)

    def image_source(self, batch: Batch) -> Source:
        """The batch's images as the fusion encoder reads them."""
        return self._once(batch, "image source", lambda: self.source_of(self.image_states(batch)))

    def source_of(self, image: Tokens, index: Tensor | None = None) -> Source:
        """Images for the fusion encoder, projected once; `index[b]` is the image that text `b` reads."""
        return self.fusion.source_of(image, index)

    def before_fusion(self, batch: Batch, view: str | None = None) -> Tokens:
        """What the fusion encoder goes on with: states of the text tower, or embedded ids."""
        if not self.fusion.begins_with_ids:
            return self.text_states(batch, view)

        def embed() -> Tokens:
            text = self.begun_with(self.options.fusion.first_token, text_of(batch, view))
            return self.text.embed(text, drawn_as(text.layout, batch, view, stage=1), self.rng)

        return self._once(batch, f"embedded {view}", embed)

    def fuse(self, text: Tokens, image: Source, selected: SelectedRows | None = None) -> Tokens:
        """Text that has read its images."""
        return self.fusion(text, image, self.rng, selected)

    def pooled(self, tokens: Tokens) -> Tensor:
        """`[B, D]`: what stands for the samples of the joint stream, or else of the text tower."""
        return (self.joint if self.joint is not None else self.text).pooled(tokens)

    # ---- inside

    def _make_joint(self, vocab_size: int, streams: itertools.count, values: int | None) -> Joint | None:
        stack, image = self.options.joint, self.options.image
        if stack is None:
            return None
        width = image.width if stack.source is not None else None
        return Joint(stack, vocab_size, streams, self.impl, feature_values=values, source_width=width)

    def _pictures(self, batch: Batch) -> Any:
        """As the joint stream reads them."""
        as_cells = isinstance(self.joint.image, GridEmbedder) and batch.image is not None
        return self.cells(batch) if as_cells else batch.image

    def _hidden_tokens(self, batch: Batch, view: str | None) -> Tensor | None:
        """Of the pictures: rows of regions, or a bool for each cell."""
        hides_codes = view is not None and isinstance(batch.views[view], HiddenCodes)
        return self.hidden_cells(batch, view) if hides_codes else hidden_rows(batch, view)

    def _make_decoder(self, vocab_size: int, streams: itertools.count) -> Decoder | None:
        stack = self.options.decoder
        if stack is None:
            return None
        width = getattr(self.options, stack.source).width if stack.source is not None else None
        return Decoder(stack, vocab_size, width, streams, self.impl)

    def _text_states(self, role: str, batch: Batch, view: str | None, selected: SelectedRows | None) -> Tokens:
        def read() -> Tokens:
            if role == "text" and self.co_attention is not None:
                _, states = self._read_together(batch, view)
                return self.text.transformer(states, rng=self.rng, layers=LAST, selected=selected)
            text = text_of(batch, view)
            return getattr(self, role)(text, drawn_as(text.layout, batch, view), self.rng, selected)

        return self._of_all(batch, f"{role} {view}", selected, read)

    def _read_together(self, batch: Batch, view: str | None) -> tuple[Tokens, Tokens]:
        """Both towers before their last layers, where they read each other."""

        def read() -> tuple[Tokens, Tokens]:
            text = text_of(batch, view)
            pictures, texts = drawn_as(batch.image_layout, batch, view), drawn_as(text.layout, batch, view)
            image = self.image.embed(batch.image, pictures, self.rng, hidden_rows(batch, view))
            towers = self.image.transformer, self.text.transformer
            return self.co_attention(image, self.text.embed(text, texts, self.rng), towers, self.rng)

        return self._once(batch, f"together {view}", read)

    def begun_with(self, token: int | None, text: Text) -> Text:
        """The same text with another first token."""
        if token is None:
            return text
        first = text.layout.starts[:, 0].long()
        return dataclasses.replace(text, ids=text.ids.index_fill(0, first, token % self.vocab_size))

    def _of_all(self, batch: Batch, name: str, selected: SelectedRows | None, read: Callable[[], Tokens]) -> Tokens:
        """A pass for whoever asks; one for selected rows is for its caller alone."""
        return self._once(batch, name, read) if selected is None else read()

    def _states_of(self, role: str, batch: Batch, view: str | None) -> Tokens:
        """The pass over a batch by which another role reads this one."""
        return self.image_states(batch) if role == "image" else self._pass_of(role)(batch, view)

    def _before_writing(self, batch: Batch, view: str | None) -> Tokens | Source | Tensor | None:
        """What the decoder has of another role: states to begin with, or a source."""
        if (source := self.options.decoder.source) is None:
            return None
        if self.decoder.prefix is None:
            return self.decoder_source(batch, view)
        states = self._states_of(source, batch, view)
        return states if self.decoder.pooled_prefix is None else self.image.pooled(states)

    def _pass_of(self, role: str) -> Callable[..., Tokens]:
        return {
            "image": self.image_states,
            "text": self.text_states,
            "fusion": self.fused_states,
            "joint": self.joint_states,
        }[role]

    def _masked_states(self, batch: Batch, view: str) -> Tokens:
        masked = batch.views[view]
        role = self.last_role if isinstance(masked, MaskedWords) else self.region_role
        layout, segment = self._stream_of(role, batch, view)
        rows = masked.places.rows(layout, segment)
        selected = SelectedRows.of(rows, masked.places.samples, layout, segment)
        read = self._pass_of(role)
        read_whole = self.read_whole.get(view) in batch.views
        if getattr(getattr(self.options, role), "mask", "full") in ("full", "separate") and not read_whole:
            return read(batch, view, selected)
        # Rows of a causal segment are told by their position among all of it.
        return Tokens(vk.take_rows(read(batch, view).hidden, rows, impl=self.impl), selected.layout)

    def _stream_of(self, role: str, batch: Batch, view: str) -> tuple[vk.SegmentLayout, int]:
        """Layout of a role's pass over a view, and the segment that the view hides some of."""
        hides = "text" if isinstance(batch.views[view], MaskedWords) else "image"
        if role == "joint":
            return self._joint_layout(batch, view), self.joint.segment(hides)
        if role == "image":
            return self.image.embedder.layout(drawn_as(batch.image_layout, batch, view)), self.image.segment
        return drawn_as(batch.text.layout, batch, view), 0

    def _joint_layout(self, batch: Batch, view: str | None) -> vk.SegmentLayout:
        text = text_of(batch, view) if self.joint.text is not None else None
        image = batch.image_layout if batch.image is not None and self.joint.image is not None else None
        has_own_length = view is not None and isinstance(batch.views[view], Text)
        is_the_batchs = self.joint.segments == ["text", "image"] and not has_own_length
        layout = batch.layout if is_the_batchs else self.joint.layout_of(batch.layout, text and text.layout, image)
        return drawn_as(layout, batch, view)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionLanguageModel:
        super()._apply(fn, recurse)
        self.rng.state = fn(self.rng.state)
        return self
