"""Causal language modelling: of a text alone, or of what is said of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from engine.batch import Batch, Sample
from engine.models.transformer import Tokens
from engine.objectives.parts.objective import Draw
from engine.objectives.parts.writing import NextWords, WritingObjective
from engine.sections import require

WRITERS = ("decoder", "joint", "text")
"""Roles that may write, the first that a model has."""


@dataclass
class CausalLanguage(WritingObjective):
    """Causal language modelling of the text, beside its image where the writer reads one (LM).

    Every token but the first is predicted, mean over them.
    """

    roles: ClassVar[tuple[str, ...]] = ("decoder or joint or text",)

    def check(self, config: Any) -> None:
        super().check(config)
        model = config.model
        if model.decoder is None and model.joint is None:
            mask = model.text.mask
            require(mask == "causal", f"objectives.causal_language needs model.text.mask causal, got {mask}")

    def prepare(self, sample: Sample, draw: Draw) -> None:
        require(len(sample.text) > 1, "a text of one token, causal_language needs two")
        sample.views[self.name] = NextWords.of_sample(sample.text.ids[1:])

    def writer(self, model: Any) -> str:
        return next(name for name in WRITERS if getattr(model, name) is not None)

    def written(self, model: Any, batch: Batch) -> tuple[Tokens, int]:
        role = self.writer(model)
        if role == "joint":
            writes = model.options.joint.mask in ("causal", "prefix")
            return model.joint_states(batch, mask=None if writes else "prefix"), model.joint.segment("text")
        read = model.decoder_states(batch) if role == "decoder" else model.text_states(batch)
        return read, read.layout.num_segments - 1
