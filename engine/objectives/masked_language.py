"""Masked-language modelling of the caption beside its image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.objectives.normalization import normalizer


@dataclass(frozen=True)
class MaskedLanguageObjective:
    """Cross-entropy of the words that stood where the caption was corrupted, mean over these places."""

    def __call__(
        self, model: VisionLanguageModel, batch: Batch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        states, targets = model.masked_word_states(batch), batch.masked_words.targets
        total = model.masked_language_head.loss(states, targets, model.words)
        return {"masked_language": total * normalizer(batch, "masked_words")}, {}
