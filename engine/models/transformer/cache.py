"""Keys and values of tokens that were read before: what decoding goes on from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import vlkernels as vk
from torch import Tensor


@dataclass(frozen=True)
class Extension:
    """New tokens of some samples and where their keys and values go: behind those of the tokens before them."""

    storage: list[Tensor]
    """Of every layer `[slots * capacity + 1, 2, H, K]`; the last row is for tokens that belong to nobody."""
    rows: Tensor
    """int64 [T]: of the storage, where the new tokens go."""
    layout: vk.SegmentLayout
    """Of the storage with the new tokens."""
    slots: Tensor
    """int64 [B]: the slot of every sample that goes on."""
    in_segment: Tensor
    """int32 [T]: positions of the new tokens in their segments."""
    in_sample: Tensor
    """int32 [T]: positions of the new tokens in their samples."""

    def write(self, layer: int, keys_values: Tensor) -> Tensor:
        """Put the new tokens' `[T, 2, H, K]`; those of all tokens in the storage."""
        storage = self.storage[layer]
        storage.index_copy_(0, self.rows, keys_values)
        return storage[:-1]


class KeyValueCache:
    """A slot of `capacity` rows for every sample, in every layer's storage. Samples grow by their last segment.

    Args:
        shape: (layers, heads, width of a head).
        slots: how many samples.
        capacity: tokens of the longest sample.
        segments: how many a sample has.
        like: a tensor with the dtype and the device of the states.
    """

    def __init__(self, shape: tuple[int, int, int], *, slots: int, capacity: int, segments: int, like: Tensor):
        layers, heads, width = shape
        self.storage = [like.new_zeros(slots * capacity + 1, 2, heads, width) for _ in range(layers)]
        self.lengths = torch.zeros(slots, segments, dtype=torch.int32, device=like.device)
        self.capacity = capacity
        self.longest = 0

    def extend(self, layout: vk.SegmentLayout, slots: Tensor) -> Extension:
        """Room for the tokens of `layout`, whose sample b goes on with `slots[b]` (int64)."""
        self.longest += layout.max_seqlen
        assert self.longest <= self.capacity, f"{self.longest} tokens in a cache for {self.capacity}"
        before = self.lengths[slots]
        sample, segment = layout.token_sample().long(), layout.token_segment().long()
        nobody, sample = sample < 0, sample.clamp(min=0)
        in_segment = before[sample, segment.clamp(min=0)] + layout.token_position("segment")
        in_sample = before.sum(1, dtype=torch.int32)[sample] + layout.token_position("sample")
        rows = (slots[sample] * self.capacity + in_sample).masked_fill(nobody, len(self.lengths) * self.capacity)
        self.lengths = self.lengths.index_add(0, slots, layout.lengths)
        keys = vk.SegmentLayout.slots(self.lengths, self.capacity, max_seqlen=self.longest)
        return Extension(self.storage, rows, keys, slots, in_segment, in_sample)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Every slot of `target` goes on from what the slot of `source` in the same place holds."""
        for storage in self.storage:
            slots = storage[:-1].unflatten(0, (-1, self.capacity))[:, : self.longest]
            slots[target] = slots[source]
        self.lengths[target] = self.lengths[source]
