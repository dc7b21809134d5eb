"""What a view makes of a batch: another text, and what of the pictures is hidden."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from engine.batch import TEXT, Batch, MaskedRegions, MaskedWords, Text


def text_of(batch: Batch, view: str | None) -> Text:
    """The text of the batch, or what a view has made of it."""
    made = batch.views[view] if view is not None else None
    if isinstance(made, MaskedWords):
        return dataclasses.replace(batch.text, ids=made.ids)
    if isinstance(made, Text):
        return made
    return batch.text if batch.text is not None else _no_text(batch)


def hidden_rows(batch: Batch, view: str | None) -> Tensor | None:
    """int64 `[M]`: regions, of all there are, that a view hides."""
    masked = batch.views[view] if view is not None else None
    if not isinstance(masked, MaskedRegions):
        return None
    hidden = masked.places if masked.hidden is None else masked.hidden
    return hidden.rows(batch.image_layout)


def _no_text(batch: Batch) -> Text:
    """Of a batch of pictures alone."""
    return Text(torch.empty(0, dtype=torch.int64, device=batch.layout.device), batch.layout.select((TEXT,)))
