"""Which query segment may see which key segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout, lasting

NONE, FULL, CAUSAL = 0, 1, 2
CODES = {"none": NONE, "full": FULL, "causal": CAUSAL}
_DRAWN = {NONE: "·", FULL: "█", CAUSAL: "◣"}


class SegmentMask:
    """A table ``[Sq, Sk]`` of ``"none" | "full" | "causal"``: rows are query segments, columns key segments.

    ``causal`` lets query ``i`` of a segment of ``Lq`` tokens see key ``j`` of a segment of ``Lk`` tokens when
    ``j <= i + Lk - Lq``: the plain causal mask on the diagonal of a self table, ends aligned (bottom-right, as
    flash-attn does) in a rectangular table.
    """

    def __init__(self, rows: Sequence[Sequence[str]]):
        unknown = [cell for row in rows for cell in row if cell not in CODES]
        if unknown:
            raise ValueError(f'mask cells must be "none", "full" or "causal", got {unknown[0]!r}')
        if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
            raise ValueError(f"mask rows must be non-empty and equally long, got lengths {[len(r) for r in rows]}")
        self.codes = tuple(tuple(CODES[cell] for cell in row) for row in rows)
        # Known before a graph is traced: a graph that looked at the codes would serve this table only.
        self._causal_off_diagonal = next(
            ((q, k) for q, row in enumerate(self.codes) for k, code in enumerate(row) if code == CAUSAL and q != k), None
        )
        self._tables: dict[torch.device, Tensor] = {}
        self._selections: dict[tuple[int, ...], SegmentMask] = {}
        self.table("cpu")

    @classmethod
    def full(cls, num_segments: int = 1) -> SegmentMask:
        return cls([["full"] * num_segments] * num_segments)

    @classmethod
    def causal(cls, num_segments: int = 1) -> SegmentMask:
        """Every token sees itself and what lies before it in its sample."""
        order = ("none", "causal", "full")
        return cls([[order[(q > k) - (q < k) + 1] for k in range(num_segments)] for q in range(num_segments)])

    @classmethod
    def prefix_lm(cls) -> SegmentMask:
        """Segment 0 (image) sees itself; segment 1 (text) sees segment 0 and its own past."""
        return cls([["full", "none"], ["full", "causal"]])

    @classmethod
    def block_diagonal(cls, groups: Sequence[int]) -> SegmentMask:
        """Segments see the segments of their own group only; ``groups`` gives the number of segments in each."""
        group_of = [g for g, size in enumerate(groups) for _ in range(size)]
        return cls([["full" if a == b else "none" for b in group_of] for a in group_of])

    @property
    def num_query_segments(self) -> int:
        return len(self.codes)

    @property
    def num_key_segments(self) -> int:
        return len(self.codes[0])

    def table(self, device: torch.device | str) -> Tensor:
        """int32 ``[Sq * Sk]`` codes on a device: data to the kernels, so another table never recompiles them."""
        device = torch.device(device)
        if device not in self._tables:
            flat = [code for row in self.codes for code in row]
            self._tables[device] = lasting(lambda: torch.tensor(flat, dtype=torch.int32, device=device))
        return self._tables[device]

    def of_queries(self, segments: Sequence[int]) -> SegmentMask:
        """The rows of some query segments, which then are a stream of their own with the keys of all as another."""
        chosen = tuple(segments)
        if not chosen or any(not 0 <= s < self.num_query_segments for s in chosen):
            raise ValueError(f"segments must be indices below {self.num_query_segments}, got {list(chosen)}")
        if chosen not in self._selections:
            rows = self._rows()
            self._selections[chosen] = SegmentMask([rows[s] for s in chosen])
        return self._selections[chosen]

    def check(self, layout: SegmentLayout, kv_layout: SegmentLayout | None) -> None:
        """Raise unless the table fits the layouts and, within one stream, is causal on its diagonal only."""
        keys = layout if kv_layout is None else kv_layout
        if (self.num_query_segments, self.num_key_segments) != (layout.num_segments, keys.num_segments):
            raise ValueError(
                f"mask must be [Sq, Sk] = [{layout.num_segments}, {keys.num_segments}], "
                f"got [{self.num_query_segments}, {self.num_key_segments}]"
            )
        if kv_layout is None and self._causal_off_diagonal is not None:
            q, k = self._causal_off_diagonal
            raise ValueError(f"within one stream only the diagonal may be causal, got causal at [{q}, {k}]")

    def dense(self, layout: SegmentLayout, kv_layout: SegmentLayout | None = None, kv_index: Tensor | None = None) -> Tensor:
        """bool ``[Tq, Tk]``: may packed row q see packed row k? Built for references and tests only."""
        self.check(layout, kv_layout)
        keys = layout if kv_layout is None else kv_layout
        q_sample, k_sample = layout.token_sample().long(), keys.token_sample().long()
        q_segment, k_segment = layout.token_segment().long(), keys.token_segment().long()
        wanted = q_sample if kv_index is None else kv_index.long()[q_sample.clamp(min=0)]
        same = (wanted[:, None] == k_sample[None]) & (q_sample >= 0)[:, None] & (k_sample >= 0)[None]
        table = self.table(layout.device).view(self.num_query_segments, self.num_key_segments)
        code = table[q_segment.clamp(min=0)[:, None], k_segment.clamp(min=0)[None]]
        return same & ((code == FULL) | ((code == CAUSAL) & _before_the_end(layout, keys)))

    def copy(self) -> SegmentMask:
        """The same table without what was cached for other devices."""
        return SegmentMask(self._rows())

    def _rows(self) -> list[list[str]]:
        names = {code: name for name, code in CODES.items()}
        return [[names[code] for code in row] for row in self.codes]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SegmentMask) and self.codes == other.codes

    def __hash__(self) -> int:
        return hash(self.codes)

    def __repr__(self) -> str:
        return f"SegmentMask({self._rows()})"

    def __str__(self) -> str:
        """The table drawn: full block, lower triangle for causal, dot for none."""
        return "\n".join(" ".join(_DRAWN[code] for code in row) for row in self.codes)


def _before_the_end(layout: SegmentLayout, keys: SegmentLayout) -> Tensor:
    """bool ``[Tq, Tk]``: counted from the ends of their segments, the key lies no later than the query."""
    return _tokens_to_the_end(keys)[None] >= _tokens_to_the_end(layout)[:, None]


def _tokens_to_the_end(layout: SegmentLayout) -> Tensor:
    if layout.lengths.numel() == 0:
        return torch.zeros(layout.num_tokens, dtype=torch.int32, device=layout.device)
    segment = layout.token_sample().clamp(min=0) * layout.num_segments + layout.token_segment().clamp(min=0)
    return layout.lengths.flatten()[segment.long()] - layout.token_position("segment")
