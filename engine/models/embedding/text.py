"""Text: words, positions, types and places on a page."""

from __future__ import annotations

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.models.embedding.page import ConcatenatedPage, SummedPage
from engine.models.embedding.rows import Rows, table
from engine.models.embedding.sinusoids import sinusoids
from engine.sections.inputs import TextInput


class TextEmbedder(nn.Module):
    """Sums the rows of a token's tables; BERT's where nothing else is asked for."""

    def __init__(self, options: TextInput, width: int, eps: float, vocab_size: int, impl: str):
        super().__init__()
        own = options.embedding_width or width
        self.offset = options.position_offset
        self.words = table(vocab_size, own)
        self._add_positions(options, own)
        self.types = table(options.types, own) if options.types else None
        self.page = {"sum": SummedPage, "concat": lambda width: ConcatenatedPage(width, impl)}.get(
            options.page, lambda _: None
        )(own)
        self.norm = vk.FusedLayerNorm(own, eps) if options.embedding_norm else None

    def _add_positions(self, options: TextInput, width: int) -> None:
        rows = options.max_positions + options.position_offset
        self.positions: Tensor | None = None
        if options.positions == "learned":
            self.positions = table(rows, width)
        elif options.positions == "sinusoidal":
            del self.positions
            waves = sinusoids(torch.arange(rows), width, interleaved=True)
            self.register_buffer("positions", waves, persistent=False)

    def rows(
        self,
        ids: Tensor,
        layout: vk.SegmentLayout,
        types: Tensor | None = None,
        boxes: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Rows:
        """`ids` and `types` `[T]`, `boxes` `[T, 4]`; types are 0 where none are given, `position` `[T]` is that in the
        text unless something stands before it."""
        position = layout.token_position() if position is None else position
        tables, columns = self._placed(position, types)
        tables, columns = [self.words, *tables], [ids.to(torch.int32)[:, None], *columns]
        dense = None
        if isinstance(self.page, SummedPage):
            tables += self.page.tables
            columns.append(self.page.columns(boxes))
        elif self.page is not None:
            dense = self.page(boxes)
        return Rows(tuple(tables), torch.cat(columns, dim=1), dense, self.norm)

    def rows_in_place_of_words(self, dense: Tensor, position: Tensor) -> Rows:
        """Of tokens `[n, D]` that are no words but stand at these positions `[n]` as such."""
        tables, columns = self._placed(position, None)
        none = torch.empty(len(dense), 0, dtype=torch.int32, device=dense.device)
        return Rows(tuple(tables), torch.cat([none, *columns], dim=1), dense, self.norm)

    def _placed(self, position: Tensor, types: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Tables of positions and types, and a column for each."""
        tables, columns = [], []
        if self.positions is not None:
            tables.append(self.positions)
            columns.append(torch.where(position < 0, -1, position + self.offset)[:, None])
        if self.types is not None:
            tables.append(self.types)
            columns.append((torch.zeros_like(position) if types is None else types).to(torch.int32)[:, None])
        return tables, columns
