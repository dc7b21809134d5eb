"""Causal language modelling: of a text alone, or of what is said of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from engine.batch import Batch, Sample, Words
from engine.models.transformer import Tokens
from engine.objectives.parts.objective import Draw
from engine.objectives.parts.writing import NextWords, WritingObjective
from engine.sections import require

WRITERS = ("decoder", "joint", "text")
"""Roles that may write, the first that a model has."""
OPENED = "causal_language text"
"""The view that is the text with another first token."""


@dataclass
class CausalLanguage(WritingObjective):
    """Causal language modelling of the text, beside its image where the writer reads one (LM).

    Every token but the first is predicted, mean over them.
    """

    roles: ClassVar[tuple[str, ...]] = ("decoder or joint or text",)

    opening: Literal["cls", "sentinel"] = "cls"
    """What stands before the words. cls: [CLS], as everywhere; sentinel: the tokenizer's first one ([DEC] of BLIP)."""

    def check(self, config: Any) -> None:
        super().check(config)
        sentinels = config.tokenizer.sentinels
        require(
            self.opening == "cls" or config.tokenizer.path is not None or sentinels > 0,
            f"objectives.causal_language.opening sentinel needs tokenizer.sentinels of at least 1, got {sentinels}",
        )
        model = config.model
        if model.decoder is None and model.joint is None:
            mask = model.text.mask
            require(mask == "causal", f"objectives.causal_language needs model.text.mask causal, got {mask}")

    def prepare(self, sample: Sample, draw: Draw) -> None:
        require(len(sample.text) > 1, "a text of one token, causal_language needs two")
        sample.views[self.name] = NextWords.of_sample(sample.text.ids[1:])
        if self.opening == "sentinel":
            ids = np.concatenate((draw.tokenizer.sentinel_ids[:1], sample.text.ids[1:]))
            sample.views[OPENED] = Words(ids, sample.text.words)

    def mask_of_joint(self, joint: Any) -> str:
        return joint.mask if joint.mask in ("causal", "prefix") or not joint.text else "prefix"

    def writer(self, model: Any) -> str:
        return next(name for name in WRITERS if getattr(model, name) is not None)

    def written(self, model: Any, batch: Batch) -> tuple[Tokens, int]:
        role, view = self.writer(model), OPENED if self.opening == "sentinel" else None
        if role == "joint":
            mask = self.mask_of_joint(model.options.joint)
            return model.joint_states(batch, view, mask=mask), model.joint.segment("text")
        read = model.decoder_states(batch, view) if role == "decoder" else model.text_states(batch, view)
        return read, read.layout.num_segments - 1
