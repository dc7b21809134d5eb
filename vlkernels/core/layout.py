"""Where every segment of every sample lies in a packed tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlkernels.core import checks, layout_checks
from vlkernels.core.layout_checks import MAX_SEGMENTS, MAX_TOKENS, Lengths

__all__ = ["MAX_SEGMENTS", "MAX_TOKENS", "Lengths", "Made", "SegmentLayout", "lasting"]

Made = TypeVar("Made")


class SegmentLayout:
    """Segment ``s`` of sample ``b`` is rows ``starts[b, s] : starts[b, s] + lengths[b, s]`` of a packed tensor.

    Args:
        lengths: ``[B, S]`` tokens per segment, on the host (an integer CPU tensor or rows of ints); zeros allowed.
        capacity: rows of the packed tensor; rows past the last sample belong to nobody (output 0, gradient 0).
            Default: exactly the sum of the lengths.
        sample_ids: ``[B]`` identity of each sample for :class:`Rng`; default ``0 .. B-1``.

    Kernels read ``starts`` and ``lengths`` from the device; ``num_tokens``, ``max_seqlen``, ``max_segment_lengths`` and
    ``segment_totals`` (rows of each segment over all samples) are host integers, exact or upper bounds, so nothing ever
    waits for the device. ``exact``: the host knows that every row belongs to a sample.
    """

    def __init__(self, lengths: Lengths, capacity: int | None = None, sample_ids: Tensor | Sequence[int] | None = None):
        host = layout_checks.host_lengths(lengths)
        ends = host.flatten().cumsum(0).view_as(host) if host.numel() else host
        total = int(host.sum())
        if capacity is not None and capacity < total:
            raise ValueError(f"capacity must be at least the sum of the lengths = {total}, got {capacity}")
        layout_checks.check_tokens(total if capacity is None else capacity)
        per_sample = host.sum(1)
        self._set(
            starts=(ends - host).to(torch.int32),
            lengths=host.to(torch.int32),
            sample_ids=layout_checks.host_sample_ids(sample_ids, len(host)),
            num_tokens=total if capacity is None else int(capacity),
            max_seqlen=int(per_sample.max()) if len(host) else 0,
            max_segment_lengths=tuple(host.max(0).values.tolist()) if len(host) else (0,) * host.shape[1],
            segment_totals=tuple(host.sum(0).tolist()),
            rows_per_sample=None,
            exact=capacity is None,
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, max_seqlen: int, num_tokens: int | None = None) -> SegmentLayout:
        """One segment per sample from the field's ``cu_seqlens [B+1]``; lengths stay on its device.

        ``num_tokens`` is the number of rows of the packed tensor; without it the layout must lie on the CPU. Bounds that do
        not rise from 0 to at most ``num_tokens``, by at most ``max_seqlen``, are an error, on a device by an assertion there.
        """
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens must be [B+1], got {list(cu_seqlens.shape)}")
        if num_tokens is None:
            if cu_seqlens.device.type != "cpu":
                raise ValueError("num_tokens is required when cu_seqlens is on a device: reading it would wait for the device")
            num_tokens = int(cu_seqlens[-1])
        checks.check_integer("cu_seqlens", cu_seqlens)
        layout_checks.check_tokens(num_tokens)
        if not torch.compiler.is_compiling():
            layout_checks.check_bounds(cu_seqlens, max_seqlen, num_tokens)
        bounds = cu_seqlens.to(torch.int32)
        layout = cls.__new__(cls)
        layout._set(
            starts=bounds[:-1, None].contiguous(),
            lengths=bounds.diff()[:, None].contiguous(),
            sample_ids=torch.arange(bounds.numel() - 1, dtype=torch.int32, device=bounds.device),
            num_tokens=num_tokens,
            max_seqlen=max_seqlen,
            max_segment_lengths=(max_seqlen,),
            segment_totals=(num_tokens,),
            rows_per_sample=None,
        )
        return layout

    @classmethod
    def padded(cls, lengths: Tensor | Sequence[int], max_len: int) -> SegmentLayout:
        """One segment per sample inside a padded ``[B, max_len, ...]`` tensor flattened to ``[B * max_len, ...]``."""
        host = layout_checks.host_lengths([[n] for n in lengths] if not isinstance(lengths, Tensor) else lengths[:, None])
        if len(host) and int(host.max()) > max_len:
            raise ValueError(f"lengths must be at most max_len = {max_len}, got {int(host.max())}")
        layout_checks.check_tokens(len(host) * max_len)
        layout = cls.__new__(cls)
        layout._set(
            starts=(torch.arange(len(host), dtype=torch.int32) * max_len)[:, None].contiguous(),
            lengths=host.to(torch.int32),
            sample_ids=layout_checks.host_sample_ids(None, len(host)),
            num_tokens=len(host) * max_len,
            max_seqlen=int(host.max()) if len(host) else 0,
            max_segment_lengths=(int(host.max()) if len(host) else 0,),
            segment_totals=(int(host.sum()),),
            rows_per_sample=max_len,
        )
        return layout

    @classmethod
    def slots(cls, lengths: Tensor, rows: int, *, max_seqlen: int) -> SegmentLayout:
        """The segments of sample b one behind the other from row ``b * rows`` on: room for samples that grow, as in a cache.

        ``lengths`` is int32 ``[B, S]`` on any device, and stays there; ``max_seqlen``, at most ``rows``, bounds their sums.
        """
        checks.check_integer("lengths", lengths)
        checks.check_shape("lengths", lengths, "[B, S]", (None, None))
        if max_seqlen > rows:
            raise ValueError(f"max_seqlen must be at most rows = {rows}, got {max_seqlen}")
        num_samples, num_segments = lengths.shape
        layout_checks.check_tokens(num_samples * rows)
        lengths = lengths.to(torch.int32).contiguous()
        first = torch.arange(num_samples, dtype=torch.int32, device=lengths.device)
        layout = cls.__new__(cls)
        layout._set(
            starts=first[:, None] * rows + lengths.cumsum(1, dtype=torch.int32) - lengths,
            lengths=lengths,
            sample_ids=first,
            num_tokens=num_samples * rows,
            max_seqlen=max_seqlen,
            max_segment_lengths=(max_seqlen,) * num_segments,
            segment_totals=(num_samples * max_seqlen,) * num_segments,
            rows_per_sample=rows,
        )
        return layout

    @classmethod
    def joined(cls, parts: Sequence[SegmentLayout | int]) -> SegmentLayout:
        """Samples that consist of the segments of several layouts, one behind the other; ``n``: a segment of n tokens.

        ``SegmentLayout.joined((1, image))`` puts a class token before every image. Sample ids are the first layout's.
        """
        layouts = [part for part in parts if isinstance(part, SegmentLayout)]
        layout_checks.check_joined(parts, layouts)
        like = layouts[0].lengths
        bounds = [(p,) if isinstance(p, int) else p.max_segment_lengths for p in parts]
        totals = [(p * len(like),) if isinstance(p, int) else p.segment_totals for p in parts]
        rows = sum(p * len(like) if isinstance(p, int) else p.num_tokens for p in parts)
        layout_checks.check_tokens(rows)
        lengths = torch.cat([torch.full_like(like[:, :1], p) if isinstance(p, int) else p.lengths for p in parts], dim=1)
        ends = lengths.flatten().cumsum(0, dtype=torch.int32).view_as(lengths)
        joined = cls.__new__(cls)
        joined._set(
            starts=ends - lengths,
            lengths=lengths,
            sample_ids=layouts[0].sample_ids,
            num_tokens=rows,
            max_seqlen=sum(p if isinstance(p, int) else p.max_seqlen for p in parts),
            max_segment_lengths=sum(bounds, ()),
            segment_totals=sum(totals, ()),
            rows_per_sample=None,
            exact=all(layout.exact for layout in layouts),
        )
        return joined

    def _set(
        self,
        *,
        starts: Tensor,
        lengths: Tensor,
        sample_ids: Tensor,
        num_tokens: int,
        max_seqlen: int,
        max_segment_lengths: tuple[int, ...],
        segment_totals: tuple[int, ...],
        rows_per_sample: int | None,
        exact: bool = False,
    ) -> None:
        self.starts = starts
        self.lengths = lengths
        self.sample_ids = sample_ids
        self.num_tokens = num_tokens
        self.max_seqlen = max_seqlen
        self.max_segment_lengths = max_segment_lengths
        self.segment_totals = segment_totals
        self.exact = exact
        self._rows_per_sample = rows_per_sample
        self._cache: dict[str, Tensor] = {}
        self._selections: dict[tuple[int, ...], SegmentLayout] = {}

    def _with_tensors(self, move) -> SegmentLayout:
        layout = SegmentLayout.__new__(SegmentLayout)
        layout._set(
            starts=move(self.starts),
            lengths=move(self.lengths),
            sample_ids=move(self.sample_ids),
            num_tokens=self.num_tokens,
            max_seqlen=self.max_seqlen,
            max_segment_lengths=self.max_segment_lengths,
            segment_totals=self.segment_totals,
            rows_per_sample=self._rows_per_sample,
            exact=self.exact,
        )
        return layout

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SegmentLayout:
        if self.starts.device == torch.device(device):
            return self
        return self._with_tensors(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SegmentLayout:
        return self._with_tensors(Tensor.pin_memory)

    @property
    def device(self) -> torch.device:
        return self.starts.device

    @property
    def num_samples(self) -> int:
        return self.lengths.shape[0]

    @property
    def num_segments(self) -> int:
        return self.lengths.shape[1]

    @property
    def has_gaps(self) -> bool:
        """Rows between two samples may belong to nobody (a padded layout)."""
        return self._rows_per_sample is not None

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 ``[B+1]``: sample ``b`` occupies rows ``cu_seqlens[b] : cu_seqlens[b+1]`` (with its padding, if padded)."""
        if self._rows_per_sample is not None:
            return torch.arange(self.num_samples + 1, dtype=torch.int32, device=self.device) * self._rows_per_sample
        return self.cu_segments[:: self.num_segments].contiguous()

    @property
    def cu_segments(self) -> Tensor:
        """int32 ``[B*S+1]``: the segment boundaries of a layout without gaps."""
        if self._rows_per_sample is not None:
            raise ValueError("a padded layout has gaps between its segments: use starts and lengths")
        if "cu_segments" not in self._cache:
            self._cache["cu_segments"] = lasting(self._cu_segments)
        return self._cache["cu_segments"]

    def _cu_segments(self) -> Tensor:
        return torch.nn.functional.pad(self.lengths.flatten().cumsum(0, dtype=torch.int32), (1, 0))

    def token_sample(self) -> Tensor:
        """int32 ``[num_tokens]``: the sample each row belongs to, -1 for rows that belong to nobody."""
        segment = self._flat_segment()
        return torch.where(segment < 0, -1, segment // max(self.num_segments, 1)).to(torch.int32)

    def token_segment(self) -> Tensor:
        """int32 ``[num_tokens]``: the segment index (within its sample) of each row, -1 for nobody's rows."""
        segment = self._flat_segment()
        return torch.where(segment < 0, -1, segment % max(self.num_segments, 1)).to(torch.int32)

    def token_position(self, within: str = "segment") -> Tensor:
        """int32 ``[num_tokens]``: position of each row within its segment or its sample, -1 for nobody's rows."""
        if within not in ("segment", "sample"):
            raise ValueError(f'within must be "segment" or "sample", got {within!r}')
        if self.starts.numel() == 0:
            return torch.full((self.num_tokens,), -1, dtype=torch.int32, device=self.device)
        segment = self._flat_segment()
        origin = self.starts if within == "segment" else self.starts[:, :1].expand_as(self.starts)
        position = self._rows() - origin.flatten()[segment.clamp(min=0)]
        return torch.where(segment < 0, -1, position).to(torch.int32)

    def token_keys(self) -> Tensor:
        """int32 ``[num_tokens, 2]``: (sample id, position in the sample), the coordinates :class:`Rng` draws by."""
        if "keys" not in self._cache:
            self._cache["keys"] = lasting(self._token_keys)
        return self._cache["keys"]

    def _token_keys(self) -> Tensor:
        sample = self.token_sample()
        ids = self.sample_ids[sample.clamp(min=0)] if self.num_samples else torch.zeros_like(sample)
        return torch.stack((ids, self.token_position("sample")), dim=1)

    def select(self, segments: Sequence[int]) -> SegmentLayout:
        """The layout of some segments only, packed without gaps, in the order given."""
        chosen = tuple(segments)
        if not chosen or any(not 0 <= s < self.num_segments for s in chosen):
            raise ValueError(f"segments must be indices below {self.num_segments}, got {list(chosen)}")
        if torch.compiler.is_compiling():  # a graph that filled the cache would not serve the next layout
            return self._select(chosen)
        if chosen not in self._selections:
            self._selections[chosen] = lasting(lambda: self._select(chosen))
        return self._selections[chosen]

    def _select(self, chosen: tuple[int, ...]) -> SegmentLayout:
        totals = tuple(self.segment_totals[s] for s in chosen)
        # Columns are stacked, not indexed: an index list would have to travel to the device.
        lengths = torch.stack([self.lengths[:, s] for s in chosen], dim=1)
        bounds = tuple(self.max_segment_lengths[s] for s in chosen)
        return self._packed(lengths, self.sample_ids, min(self.num_tokens, sum(totals)), bounds, totals)

    def with_sample_ids(self, sample_ids: Tensor) -> SegmentLayout:
        """The same rows under other identities: for passes over one batch whose random draws must differ."""
        if sample_ids.shape != (self.num_samples,):
            raise ValueError(f"sample_ids must be [B] = [{self.num_samples}], got {list(sample_ids.shape)}")
        layout = self._with_tensors(lambda tensor: tensor)
        layout.sample_ids = sample_ids.to(torch.int32).contiguous()
        return layout

    def take(self, index: Tensor) -> SegmentLayout:
        """The layout of samples ``index`` (an integer tensor on the layout's device), packed in that order.

        Lengths stay on the device, so ``num_tokens`` is the upper bound ``len(index) * max_seqlen``.
        """
        layout_checks.check_index(index, self.num_samples)
        layout_checks.check_tokens(index.numel() * self.max_seqlen)
        chosen = index.long()
        return self._packed(
            self.lengths[chosen],
            self.sample_ids[chosen],
            index.numel() * self.max_seqlen,
            self.max_segment_lengths,
            tuple(index.numel() * bound for bound in self.max_segment_lengths),
        )

    def take_positions(self, index: Tensor) -> Tensor:
        """int32: for every row of ``take(index)`` the row of this layout it comes from, -1 past the last sample."""
        taken = self.take(index)
        segment = taken._flat_segment()
        if taken.starts.numel() == 0:
            return segment
        source = self.starts[index.long()].flatten()[segment.clamp(min=0)] + taken.token_position("segment")
        return torch.where(segment < 0, -1, source).to(torch.int32)

    def _packed(
        self,
        lengths: Tensor,
        sample_ids: Tensor,
        num_tokens: int,
        bounds: tuple[int, ...],
        totals: tuple[int, ...],
    ) -> SegmentLayout:
        ends = lengths.flatten().cumsum(0, dtype=torch.int32).view_as(lengths)
        layout = SegmentLayout.__new__(SegmentLayout)
        layout._set(
            starts=ends - lengths,
            lengths=lengths,
            sample_ids=sample_ids,
            num_tokens=num_tokens,
            max_seqlen=min(self.max_seqlen, sum(bounds)),
            max_segment_lengths=bounds,
            segment_totals=totals,
            rows_per_sample=None,
        )
        return layout

    def _rows(self) -> Tensor:
        return torch.arange(self.num_tokens, dtype=torch.int32, device=self.device)

    def _flat_segment(self) -> Tensor:
        """int32 ``[num_tokens]``: index into the flattened ``[B*S]`` segments, -1 for nobody's rows."""
        if "flat_segment" not in self._cache:
            self._cache["flat_segment"] = lasting(self._find_segments)
        return self._cache["flat_segment"]

    def _find_segments(self) -> Tensor:
        rows = self._rows()
        if self.starts.numel() == 0:
            return torch.full_like(rows, -1)
        starts, lengths = self.starts.flatten(), self.lengths.flatten()
        last = torch.searchsorted(starts, rows, right=True).to(torch.int32) - 1
        inside = (last >= 0) & (rows - starts[last.clamp(min=0)] < lengths[last.clamp(min=0)])
        return torch.where(inside, last, -1).to(torch.int32)

    def __repr__(self) -> str:
        return (
            f"SegmentLayout(samples={self.num_samples}, segments={self.num_segments}, "
            f"num_tokens={self.num_tokens}, max_seqlen={self.max_seqlen}, device={str(self.device)!r})"
        )


def lasting(make: Callable[[], Made]) -> Made:
    """``make()`` for a cache that outlives the call: tensors made in inference mode could not serve a later backward."""
    if torch.compiler.is_compiling():
        return make()
    with torch.inference_mode(False):
        return make()
