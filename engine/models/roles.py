"""The roles of a model: each an embedder, a packed transformer, a mask table and what comes of its states."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.batch import Text
from engine.models.embedding import LearnedEmbedder, RowMaker, Rows, TextEmbedder, make_image_embedder
from engine.models.embedding.places import boxes_of_cells
from engine.models.embedding.rows import table
from engine.models.masks import mask_table
from engine.models.pooling import Pooling
from engine.models.recurrence import PackedGru
from engine.models.transformer import Linear, PackedTransformer, SelectedRows, Source, Tokens
from engine.sections import DecoderStack, FusionStack, ImageStack, JointStack, TextStack


class ImageTower(nn.Module):
    """The image role."""

    def __init__(self, stack: ImageStack, streams: Iterator[int], impl: str, feature_values: int | None = None):
        super().__init__()
        self.embedder = make_image_embedder(stack, stack.width, stack.eps, impl, feature_values)
        self.maker = RowMaker(stack.dropout, self.embedder.segments, streams, impl)
        self.transformer = PackedTransformer(stack, streams, impl=impl)
        self.pooling = Pooling(stack.pooling, stack, impl)
        self.mask = mask_table(stack.mask, ["image"] * self.embedder.segments)

    @property
    def segment(self) -> int:
        """Of its stream, the one that the picture's own tokens are; a class token lies before it."""
        return self.embedder.segments - 1

    def embed(self, image: Any, layout: vk.SegmentLayout, rng: vk.Rng, masked: Tensor | None = None) -> Tokens:
        """Rows of pictures, whose own tokens `layout` [B, 1] tells; `masked` `[M]` are those to hide."""
        own = self.embedder.layout(layout)
        return Tokens(self.maker(lambda: self.embedder.rows(image, layout, masked=masked), own, rng), own)

    def forward(
        self,
        image: Any,
        layout: vk.SegmentLayout,
        rng: vk.Rng,
        *,
        masked: Tensor | None = None,
        selected: SelectedRows | None = None,
    ) -> Tokens:
        """States of what `embed` makes."""
        return self.transformer(self.embed(image, layout, rng, masked), rng=rng, mask=self.mask, selected=selected)

    def pooled(self, tokens: Tokens) -> Tensor:
        """`[B, D]`."""
        return self.pooling(tokens, self.segment)


class TextTower(nn.Module):
    """A text role: `text`, `generator`."""

    def __init__(self, stack: TextStack, vocab_size: int, streams: Iterator[int], impl: str):
        super().__init__()
        self._add_embedder(stack, vocab_size, 1, streams, impl)
        self.transformer = PackedTransformer(stack, streams, impl=impl)
        self.pooling = Pooling(stack.pooling, stack, impl)
        self.mask = mask_table(stack.mask, ["text"])

    def _add_embedder(self, stack: Any, vocab_size: int, segments: int, streams: Iterator[int], impl: str) -> None:
        own = stack.embedding_width
        self.embedder = TextEmbedder(stack, stack.width, stack.eps, vocab_size, impl)
        self.maker = RowMaker(stack.dropout, segments, streams, impl)
        self.widening = Linear(own, stack.width, impl) if own is not None else None

    def embed(self, text: Text, layout: vk.SegmentLayout, rng: vk.Rng) -> Tokens:
        """Rows of a text; `layout` has the identities that this pass draws by."""
        rows = self.maker(lambda: [self.embedder.rows(text.ids, layout, text.types, text.boxes)], layout, rng)
        return Tokens(self._widened(rows), layout)

    def _widened(self, rows: Tensor) -> Tensor:
        return rows if self.widening is None else self.widening(rows)

    def forward(
        self, text: Text, layout: vk.SegmentLayout, rng: vk.Rng, selected: SelectedRows | None = None
    ) -> Tokens:
        tokens = self.embed(text, layout, rng)
        return self.transformer(tokens, rng=rng, mask=self.mask, boxes=text.boxes, selected=selected)

    def pooled(self, tokens: Tokens) -> Tensor:
        """`[B, D]`."""
        return self.pooling(tokens)


class RecurrentText(TextTower):
    """A text role that a recurrent network reads, from rows of the embedder's width."""

    def __init__(self, stack: TextStack, vocab_size: int, streams: Iterator[int], impl: str):
        nn.Module.__init__(self)
        self._add_embedder(stack, vocab_size, 1, streams, impl)
        self.widening = None
        self.recurrence = PackedGru(stack, stack.embedding_width or stack.width, impl)
        self.pooling = Pooling(stack.pooling, stack, impl)

    def forward(
        self, text: Text, layout: vk.SegmentLayout, rng: vk.Rng, selected: SelectedRows | None = None
    ) -> Tokens:
        return self.recurrence(self.embed(text, layout, rng), selected)


def make_text_tower(stack: TextStack, vocab_size: int, streams: Iterator[int], impl: str) -> TextTower:
    """Of what the section asks for."""
    return {"transformer": TextTower, "gru": RecurrentText}[stack.encoder](stack, vocab_size, streams, impl)


class Fusion(nn.Module):
    """The fusion role: a text that reads the image tower."""

    def __init__(self, stack: FusionStack, source_width: int, streams: Iterator[int], impl: str):
        super().__init__()
        self.transformer = PackedTransformer(
            stack,
            streams,
            source_width=source_width,
            cross_every=stack.cross_every,
            cross_from=stack.cross_from,
            impl=impl,
        )
        self.begins_with_ids = stack.begins_with == "ids"

    def source_of(self, image: Tokens, index: Tensor | None = None) -> Source:
        """Keys and values of image states, projected once; `index[b]` is the image that text `b` reads."""
        return Source(self.transformer.project_source(image.hidden), image.layout, index)

    def forward(self, text: Tokens, source: Source, rng: vk.Rng, selected: SelectedRows | None = None) -> Tokens:
        return self.transformer(text, rng=rng, source=source, selected=selected)


class Decoder(TextTower):
    """The decoder role: a causal text that reads another role's states, by cross-attention or as its prefix."""

    def __init__(
        self, stack: DecoderStack, vocab_size: int, source_width: int | None, streams: Iterator[int], impl: str
    ):
        nn.Module.__init__(self)
        has_prefix = source_width is not None and stack.reads == "prefix"
        attends = source_width is not None and not has_prefix
        self._add_embedder(stack, vocab_size, 1 + has_prefix, streams, impl)
        self.transformer = PackedTransformer(
            stack,
            streams,
            source_width=source_width if attends else None,
            cross_every=stack.cross_every,
            cross_from=stack.cross_from,
            within="sample",
            impl=impl,
        )
        self.pooled_prefix, each = stack.pooled_prefix, stack.pooled_prefix or 1
        self.prefix = Linear(source_width, each * (stack.embedding_width or stack.width), impl) if has_prefix else None
        prefix_mask = {"full": "prefix", "causal": "causal"}[stack.prefix_mask]
        self.mask = mask_table(prefix_mask, ["prefix", "text"]) if has_prefix else mask_table("causal", ["text"])

    def source_of(self, read: Tokens, index: Tensor | None = None) -> Source:
        """Keys and values of another role's states, projected once."""
        return Source(self.transformer.project_source(read.hidden), read.layout, index)

    def forward(
        self,
        text: Text,
        layout: vk.SegmentLayout,
        rng: vk.Rng,
        read: Tokens | Source | Tensor | None = None,
        selected: SelectedRows | None = None,
    ) -> Tokens:
        """States of the text; with a prefix of both, segment by segment. A tensor `[B, D]` is what stands for the samples,
        of which a pooled prefix is made."""
        if self.prefix is not None:
            return self.transformer(self._begun_by(read, text, layout, rng), rng=rng, mask=self.mask, selected=selected)
        tokens = self.embed(text, layout, rng)
        source = self.source_of(read) if isinstance(read, Tokens) else read
        return self.transformer(tokens, rng=rng, mask=self.mask, source=source, selected=selected)

    def answer(self, queries: LearnedEmbedder, layout: vk.SegmentLayout, source: Source, rng: vk.Rng) -> Tokens:
        """States of learned rows in place of a text, each of which sees all of its sample (DETR's object queries)."""
        rows = self.maker(lambda: [queries.rows(layout, self.embedder.norm)], layout, rng)
        return self.transformer(Tokens(self._widened(rows), layout), rng=rng, source=source)

    def _begun_by(self, read: Tokens | Tensor, text: Text, layout: vk.SegmentLayout, rng: vk.Rng) -> Tokens:
        """Rows of the prefix and of the text, whose positions go on behind it, as if all were words."""
        if isinstance(read, Tokens):
            hidden, before = read.hidden, _as_one_segment(read.layout)
        else:
            hidden, before = read, vk.SegmentLayout.joined((self.pooled_prefix, layout)).select((0,))
        whole = vk.SegmentLayout.joined((before, layout)).with_sample_ids(layout.sample_ids)
        places = whole.token_position("sample")
        of_prefix, of_text = (vk.take_segments(places, whole, (segment,)) for segment in range(2))

        def embed() -> list[Rows]:
            prefix = self.prefix(hidden).view(before.num_tokens, -1)
            words = self.embedder.rows(text.ids, layout, text.types, text.boxes, of_text)
            return [self.embedder.rows_in_place_of_words(prefix, of_prefix), words]

        rows = self.maker(embed, whole, rng)
        return Tokens(self._widened(rows), whole)


def _as_one_segment(layout: vk.SegmentLayout) -> vk.SegmentLayout:
    """All tokens of a sample, whatever they are."""
    if layout.num_segments == 1:
        return layout
    return vk.SegmentLayout.from_cu_seqlens(layout.cu_seqlens, max_seqlen=layout.max_seqlen, num_tokens=layout.num_tokens)


class Joint(nn.Module):
    """The joint role: one stream of queries, text and image. An absent segment has no tokens."""

    def __init__(
        self,
        stack: JointStack,
        vocab_size: int,
        streams: Iterator[int],
        impl: str,
        *,
        feature_values: int | None = None,
        source_width: int | None = None,
    ):
        super().__init__()
        self.stack, self.impl, width = stack, impl, stack.width
        self.queries = LearnedEmbedder(stack.queries, width) if stack.queries else None
        self.text = TextEmbedder(stack, width, stack.eps, vocab_size, impl) if stack.text else None
        has_image = stack.image is not None
        self.image = make_image_embedder(stack.image, width, stack.eps, impl, feature_values) if has_image else None
        images = 0 if self.image is None else self.image.segments
        self.segments = ["queries"] * bool(stack.queries) + ["text"] * stack.text + ["image"] * images
        self.kinds = table(len(dict.fromkeys(self.segments)), width) if stack.kinds else None
        # Queries alone have their norm where there is no text to share it with.
        alone = stack.queries and not stack.text and stack.embedding_norm
        self.queries_norm = vk.FusedLayerNorm(width, stack.eps) if alone else None
        self.maker = RowMaker(stack.dropout, len(self.segments), streams, impl)
        self.transformer = PackedTransformer(
            stack,
            streams,
            source_width=source_width,
            cross_every=stack.cross_every,
            cross_from=stack.cross_from,
            groups=self._groups(),
            impl=impl,
        )
        self.pooling = Pooling(stack.pooling, stack, impl)

    def segment(self, name: str) -> int:
        """Of its stream: where text, the queries, or the image's own tokens lie."""
        return len(self.segments) - 1 - self.segments[::-1].index(name)

    def source_of(self, image: Tokens, index: Tensor | None = None) -> Source:
        """Keys and values of image states, projected once."""
        return Source(self.transformer.project_source(image.hidden), image.layout, index)

    def forward(
        self,
        text: Text | None,
        image: Any,
        layout: vk.SegmentLayout,
        rng: vk.Rng,
        *,
        image_layout: vk.SegmentLayout | None = None,
        masked: Tensor | None = None,
        mask: str | None = None,
        source: Source | None = None,
        selected: SelectedRows | None = None,
    ) -> Tokens:
        """States over `layout`, which is `layout_of` the batch; `masked` are the tokens of the image to hide."""
        return self.transformer(
            self.embed(text, image, layout, rng, image_layout, masked),
            rng=rng,
            mask=mask_table(mask or self.stack.mask, self.segments),
            boxes=self._boxes(text, image, layout) if self.stack.relative_box is not None else None,
            source=source,
            selected=selected,
        )

    def embed(
        self,
        text: Text | None,
        image: Any,
        layout: vk.SegmentLayout,
        rng: vk.Rng,
        image_layout: vk.SegmentLayout | None = None,
        masked: Tensor | None = None,
    ) -> Tokens:
        """Rows of all segments, as `forward` begins with them."""
        rows = self.maker(lambda: self._parts(text, image, layout, image_layout, masked), layout, rng)
        return Tokens(rows, layout)

    def layout_of(
        self, samples: vk.SegmentLayout, text: vk.SegmentLayout | None, image: vk.SegmentLayout | None
    ) -> vk.SegmentLayout:
        """Of these samples' whole stream; a layout that is `None` has no tokens."""
        parts: list[vk.SegmentLayout | int] = [self.stack.queries] if self.queries is not None else []
        if self.text is not None:
            parts.append(0 if text is None else text)
        if self.image is not None:
            parts += [int(image is not None)] * (self.image.segments - 1)
            parts.append(0 if image is None else image)
        if any(isinstance(part, vk.SegmentLayout) for part in parts):
            return vk.SegmentLayout.joined(parts)
        return vk.SegmentLayout.joined((*parts, samples)).select(range(len(parts)))

    def pooled(self, tokens: Tokens) -> Tensor:
        """`[B, D]`."""
        return self.pooling(tokens)

    def _groups(self) -> tuple[tuple[int, ...], ...]:
        """Segments with feed-forward networks of their own, queries first."""
        if not self.stack.own_feed_forward:
            return ()
        return (0,), tuple(range(1, len(self.segments)))

    def _parts(
        self, text: Text | None, image: Any, layout: vk.SegmentLayout, image_layout: vk.SegmentLayout | None, masked: Tensor | None
    ) -> list[Rows]:
        parts = []
        if self.queries is not None:
            parts.append(self.queries.rows(layout, self.text.norm if self.text is not None else self.queries_norm))
        if self.text is not None:
            parts.append(self.text.rows(text.ids, layout.select((self.segment("text"),)), text.types, text.boxes))
        if self.image is not None:
            parts += self._no_image() if image is None else self.image.rows(image, image_layout, self.text, masked)
        if self.kinds is None:
            return parts
        kinds = list(dict.fromkeys(self.segments))
        return [
            dataclasses.replace(part, offset=self.kinds[kinds.index(name)])
            for part, name in zip(parts, self.segments, strict=True)
        ]

    def _no_image(self) -> list[Rows]:
        """Of a batch without pictures."""
        like = next(self.image.parameters())
        none, ids = like.new_empty(0, self.stack.width), torch.empty(0, 0, dtype=torch.int32, device=like.device)
        return [Rows((), ids, none, self.image.norm)] * self.image.segments

    def _boxes(self, text: Text, image: Any, layout: vk.SegmentLayout) -> Tensor:
        """int32 `[num_tokens, 4]`: of words, and of the cells of an even grid; queries and class tokens have none."""
        own = {self.segment("text"): text.boxes.to(torch.int32)}
        if image is not None:
            cells = self.image.places_of(image)
            own[self.segment("image")] = boxes_of_cells(cells, tuple(self.stack.image.max_grid))
        return vk.put_segments(list(own.values()), layout, [(s,) for s in own], impl=self.impl)
