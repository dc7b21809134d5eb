"""One text for all losses: where a batch has masked words too, it is read as they have left it (BERT, LayoutLMv2)."""

from __future__ import annotations

from engine.batch import Batch

WORDS = "masked_language"


def view_of_words(batch: Batch) -> str | None:
    """The view that the text is read by."""
    return WORDS if WORDS in batch.views else None
