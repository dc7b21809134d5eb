"""A decoder restores a text of which an encoder reads what noise has left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from engine.batch import Batch, Sample, Words
from engine.corruption.denoising import corrupt_spans, prefix_length
from engine.corruption.restoration import delete_tokens, infill, mask_tokens, permute_sentences, rotate, sentences_of
from engine.models.transformer import Tokens
from engine.objectives.parts.objective import Draw
from engine.objectives.parts.writing import NextWords, WritingObjective
from engine.sections import require, require_positive, require_share

READ, BEGUN = "denoising_read", "denoising_begun"
"""Views: what the encoder reads, and what the decoder goes on with."""
START = 0
"""What T5's decoder begins with: padding."""


@dataclass
class Denoising(WritingObjective):
    """A decoder writes a text beside a spoilt one that it reads (T5, BART, SimVLM)."""

    roles: ClassVar[tuple[str, ...]] = ("decoder", "text or joint")
    without_images: ClassVar[bool] = True

    noise: Literal["spans", "infilling", "masking", "deletion", "none", "prefix"] = "spans"
    """spans: each becomes a sentinel, and the decoder writes them all (T5); infilling: each becomes one mask, and the
    decoder writes the whole text (BART), as it does where tokens become masks (masking), are gone (deletion) or all there
    (none); prefix: the decoder goes on where the encoder stops, behind at least one token or the image (SimVLM)."""
    probability: float = 0.15
    """Share of tokens that noise takes (T5: 0.15, BART: 0.3)."""
    mean_span: float = 3.0
    """Mean length of a span: in tokens (spans) or words (infilling)."""
    permute: bool = False
    """Of a text that is written whole: its sentences are read in another order. They end at a full stop (BART)."""
    rotate: bool = False
    """Of a text that is written whole: it is read from some token on, and its beginning behind its end (BART)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("objectives.denoising.probability", self.probability)
        require_positive(self, "objectives.denoising", "probability", "mean_span")
        require(
            self.noise not in ("spans", "prefix") or not (self.permute or self.rotate),
            f"objectives.denoising.permute and rotate are for a text that is written whole, got noise {self.noise}",
        )

    def check(self, config: Any) -> None:
        super().check(config)
        source, readers = config.model.decoder.source, ("text", "joint", "fusion")
        named = f"objectives.denoising needs one of {', '.join(readers)} as model.decoder.source, got {source}"
        require(source in readers, named)
        joint = config.model.joint
        sees_image = source == "joint" and joint.image is not None
        require(
            self.noise != "prefix" or sees_image or config.model.reads_pictures is None,
            "objectives.denoising.noise prefix may leave the encoder nothing but the image: model.decoder.source must be "
            f"joint with model.joint.image, got {source}",
        )

    def prepare(self, sample: Sample, draw: Draw) -> None:
        start, read, targets = self._spoilt(sample.text, draw, beside_image=sample.image is not None)
        sample.views[READ] = _words(read)
        sample.views[BEGUN] = _words(np.concatenate(([start], targets[:-1])))
        sample.views[self.name] = NextWords.of_sample(targets)

    def _spoilt(self, text: Words, draw: Draw, beside_image: bool) -> tuple[int, np.ndarray, np.ndarray]:
        """The id that the decoder begins with, what the encoder reads, what the decoder writes."""
        tokenizer, random, end = draw.tokenizer, draw.random, draw.tokenizer.sep_id
        if self.noise not in ("spans", "prefix"):
            return end, self._noisy(text, draw), text.ids
        inner = text.ids[text.words >= 0]
        least_read = int(self.noise != "prefix" or not beside_image)
        require(len(inner) > least_read, f"a text of {len(inner)} tokens, denoising needs {1 + least_read}")
        if self.noise == "prefix":
            read = prefix_length(len(inner), random, least_read)
            return tokenizer.cls_id, inner[:read], np.append(inner[read:], end)
        return START, *corrupt_spans(inner, tokenizer.sentinel_ids, end, random, self.probability, self.mean_span)

    def _noisy(self, text: Words, draw: Draw) -> np.ndarray:
        """BART's noises, in its order."""
        random, mask_id, ids, words = draw.random, draw.tokenizer.mask_id, text.ids, text.words
        if self.permute:
            order = permute_sentences(sentences_of(ids, words, draw.tokenizer.full_stop_id), random)
            ids, words = ids[order], words[order]
        if self.rotate:
            order = rotate(words, random)
            ids, words = ids[order], words[order]
        if self.noise == "infilling":
            return infill(ids, words, mask_id, self.probability, random, self.mean_span)
        if self.noise == "masking":
            return mask_tokens(ids, words, mask_id, self.probability, random)
        return ids if self.noise == "none" else delete_tokens(ids, words, self.probability, random)

    def writer(self, model: Any) -> str:
        return "decoder"

    def written(self, model: Any, batch: Batch) -> tuple[Tokens, int]:
        read = model.decoder_states(batch, BEGUN, source_view=READ)
        return read, read.layout.num_segments - 1


def _words(ids: np.ndarray) -> Words:
    return Words(ids, np.full(len(ids), -1))
