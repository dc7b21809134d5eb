"""Masked-language modelling of the caption beside its image."""

from __future__ import annotations

from dataclasses import dataclass

import vlkernels as vk
from torch import Tensor

from engine.batch import TEXT, Batch
from engine.models import VisionLanguageModel
from engine.objectives.normalization import normalizer


@dataclass(frozen=True)
class MaskedLanguageObjective:
    """Cross-entropy of the words that stood where the caption was corrupted, mean over these places."""

    def __call__(
        self, model: VisionLanguageModel, batch: Batch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        read, words = model.encode_masked_words(batch), batch.masked_words
        selected = vk.take_rows(read.hidden, words.places.rows(read.layout, TEXT), impl=model.impl)
        total = model.masked_language_head.loss(selected, words.targets, model.words)
        return {"masked_language": total * normalizer(batch, "masked_words")}, {}
