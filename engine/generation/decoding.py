"""What decoding needs of a model, and the passes it makes: one over the prompts, then one per new token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import vlkernels as vk
from torch import Tensor

from engine.models.transformer import Extension, PackedTransformer, SelectedRows, Source, Tokens


class NewTokens(NamedTuple):
    """Packed tokens to embed."""

    ids: Tensor
    """int64 [T]."""
    in_segment: Tensor
    """int32 [T]: positions in their segment."""
    in_sample: Tensor
    """int32 [T]: positions in their sample, which may have segments before it."""


@dataclass(frozen=True)
class Decoder:
    """A stack that is causal in its last segment, which grows, with what stands before it and behind it."""

    stack: PackedTransformer
    embed: Callable[[NewTokens], Tensor]
    """Hidden states `[T, D]` of tokens of the last segment."""
    logits: Callable[[Tensor], Tensor]
    """`[M, V]` of final states `[M, D]`."""
    mask: vk.SegmentMask = vk.SegmentMask.causal()

    def prompt(self, ids: Tensor, layout: vk.SegmentLayout) -> Tokens:
        """A prompt of one segment, as ids."""
        return Tokens(self.embed(NewTokens(ids, layout.token_position(), layout.token_position("sample"))), layout)


class Decoding:
    """The cache of one decoding. Sample b of the prompt has the slots from `b * copies` on.

    Args:
        decoder: the model's part.
        prompt: embedded; the last segment of every sample has at least one token.
        source: what cross-attention reads; sample b reads its sample b, or `source.index[b]`.
        most: new tokens per sample at most.
        copies: continuations of a sample that are followed at once.
    """

    def __init__(self, decoder: Decoder, prompt: Tokens, source: Source | None, most: int, copies: int = 1):
        self.decoder, self.prompt, self.copies = decoder, prompt, copies
        layout = prompt.layout
        samples = torch.arange(layout.num_samples, device=layout.device)
        self.source = source if source is None or source.index is not None else replace(source, index=samples)
        self.cache = decoder.stack.new_cache(
            slots=layout.num_samples * copies,
            capacity=layout.max_seqlen + most,
            segments=layout.num_segments,
            like=prompt.hidden,
        )

    def start(self) -> Tensor:
        """`[B, V]`: logits behind the prompts, whose keys and values every copy goes on from."""
        layout = self.prompt.layout
        first = torch.arange(layout.num_samples, device=layout.device) * self.copies
        last = layout.num_segments - 1
        ends = layout.starts[:, last].long() + layout.lengths[:, last] - 1
        selected = SelectedRows(ends, _one_each(layout.num_samples, 1, layout.device), (last,))
        extension = self.cache.extend(layout, first)
        logits = self._logits(self.prompt, extension, self.source, selected)
        if self.copies > 1:
            slots = torch.arange(layout.num_samples * self.copies, device=layout.device)
            self.cache.copy(slots // self.copies * self.copies, slots)
        return logits

    def step(self, ids: Tensor, slots: Tensor) -> Tensor:
        """`[n, V]`: logits behind one more token in each of some slots."""
        layout = _one_each(len(ids), self.prompt.layout.num_segments, ids.device)
        extension = self.cache.extend(layout, slots)
        hidden = self.decoder.embed(NewTokens(ids, extension.in_segment, extension.in_sample))
        source = self.source
        if source is not None:
            source = replace(source, index=source.index[slots // self.copies])
        return self._logits(Tokens(hidden, layout), extension, source)

    def _logits(
        self, tokens: Tokens, extension: Extension, source: Source | None, selected: SelectedRows | None = None
    ) -> Tensor:
        passed = {"mask": self.decoder.mask, "source": source, "selected": selected, "extension": extension}
        return self.decoder.logits(self.decoder.stack(tokens, **passed).hidden)


@functools.lru_cache(maxsize=1024)
def _one_each(samples: int, segments: int, device: torch.device) -> vk.SegmentLayout:
    """One token in the last segment of every sample."""
    return vk.SegmentLayout([[0] * (segments - 1) + [1]] * samples).to(device)
