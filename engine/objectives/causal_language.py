"""Causal language modelling: of a text alone, or of what is said of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from engine.batch import Batch, Sample, Words
from engine.models.transformer import Tokens
from engine.objectives.parts.image_alone import IMAGE_ALONE, leave_image_alone
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

    source_reads: Literal["all", "image"] = "all"
    """What the decoder's source has read. all: what there is; image: the image alone, as it must where it is a joint stream
    that else has read the text too (E2E-VLP)."""

    def check(self, config: Any) -> None:
        super().check(config)
        self._check_source(config.model)
        sentinels = config.tokenizer.sentinels
        require(
            self.opening == "cls" or config.tokenizer.path is not None or sentinels > 0,
            f"objectives.causal_language.opening sentinel needs tokenizer.sentinels of at least 1, got {sentinels}",
        )
        model = config.model
        if model.decoder is None and model.joint is None:
            mask = model.text.mask
            require(mask == "causal", f"objectives.causal_language needs model.text.mask causal, got {mask}")

    def _check_source(self, model: Any) -> None:
        """What is to be written must not be read."""
        source = model.decoder.source if model.decoder is not None else None
        joint = source == "joint" and model.joint.text
        require(
            self.source_reads == "image" if joint else source not in ("text", "fusion"),
            f"objectives.causal_language writes the text, which the source of its decoder, {source}, reads too: let "
            "model.decoder.source be image, or joint with objectives.causal_language.source_reads image",
        )
        require(
            joint or self.source_reads == "all",
            "objectives.causal_language.source_reads image needs a joint stream with text as model.decoder.source",
        )

    def prepare(self, sample: Sample, draw: Draw) -> None:
        require(len(sample.text) > 1, "a text of one token, causal_language needs two")
        if self.source_reads == "image":
            leave_image_alone(sample)
        sample.views[self.name] = NextWords.of_sample(sample.text.ids[1:])
        if self.opening == "sentinel":
            ids = np.concatenate((draw.tokenizer.sentinel_ids[:1], sample.text.ids[1:]))
            sample.views[OPENED] = Words(ids, sample.text.words)

    def mask_of_joint(self, joint: Any) -> str:
        writes_itself = joint.text and self.source_reads == "all"
        return "prefix" if writes_itself and joint.mask not in ("causal", "prefix") else joint.mask

    def writer(self, model: Any) -> str:
        return next(name for name in WRITERS if getattr(model, name) is not None)

    def written(self, model: Any, batch: Batch) -> tuple[Tokens, int]:
        role, view = self.writer(model), OPENED if self.opening == "sentinel" else None
        if role == "joint":
            mask = self.mask_of_joint(model.options.joint)
            return model.joint_states(batch, view, mask=mask), model.joint.segment("text")
        source_view = IMAGE_ALONE if self.source_reads == "image" else None
        read = model.decoder_states(batch, view, source_view) if role == "decoder" else model.text_states(batch, view)
        return read, read.layout.num_segments - 1
