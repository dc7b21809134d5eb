"""Masked-language modelling of the caption beside its image."""

from __future__ import annotations

from dataclasses import dataclass

import vlkernels as vk
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
        fused = model.fuse(model.encode_text(batch, masked=True), model.image_source(batch))
        words = batch.masked_words
        selected = vk.take_rows(fused.hidden, words.places.rows(fused.layout), impl=model.impl)
        total = model.masked_language_head.loss(selected, words.targets, model.text_embedder.words)
        return {"masked_language": total * normalizer(batch, "masked_words")}, {}
