"""Text-image alignment: which words stand in lines that are covered in the picture (TIA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch, OnDevice, Places, Sample
from engine.corruption.pages import alignment_labels, boxes_of_lines, cover_lines
from engine.objectives.parts.baselines import binary_entropy
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer, widened
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.objectives.parts.pages import blank_boxes, require_pixels
from engine.objectives.parts.words_view import WORDS, view_of_words
from engine.sections import require, require_share


@dataclass
class AskedWords(OnDevice):
    """Tokens of which it is asked whether their line is covered."""

    places: Places
    covered: Tensor
    """float32 [M]: 1 where it is."""

    def __len__(self) -> int:
        return len(self.places)


@dataclass
class CoveredLines(Objective):
    """Which words stand in lines that are covered in the picture of their page (TIA)?

    Binary cross-entropy, mean over the tokens that are asked about: not special ones, and not those that masked_language
    has selected. Beside another page's picture, or none, all are covered.
    """

    roles: ClassVar[tuple[str, ...]] = ("joint",)
    beside: ClassVar[tuple[str, ...]] = (WORDS,)
    reads_whole: ClassVar[str | None] = WORDS

    probability: float = 0.15
    """Share of lines that are covered."""

    def __post_init__(self) -> None:
        require_share("objectives.covered_lines.probability", self.probability)

    def check(self, config: Any) -> None:
        super().check(config)
        require_pixels(config, "objectives.covered_lines")

    def prepare(self, sample: Sample, draw: Draw) -> None:
        text, words = sample.text, sample.views.get(WORDS)
        require(text.lines is not None, "a text without lines, objectives.covered_lines needs pages")
        covered = cover_lines(text.lines, self.probability, draw.random)
        blank_boxes(sample, boxes_of_lines(text.boxes, text.lines, covered))
        masked = np.empty(0, dtype=np.int64) if words is None else words.places.offsets.numpy()
        positions, labels = alignment_labels(text.lines, covered, masked, sample.own_image is not False)
        sample.views[self.name] = AskedWords(Places.of_sample(positions), torch.from_numpy(labels).float())

    def build_head(self, model: Any) -> nn.Module:
        return nn.Linear(model.options.joint.width, 1)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        total, right = self._compared(model, batch)
        report = {"covered_lines_accuracy": right.sum() / max(right.numel(), 1)}
        return {self.name: total * normalizer(batch, self.name)}, report

    def _compared(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over the tokens, and `[M]`: is the likelier answer the right one?"""
        asked, read = batch.views[self.name], model.joint_states(batch, view_of_words(batch))
        rows = asked.places.rows(read.layout, model.joint.segment("text"))
        states = vk.take_rows(read.hidden, rows, impl=model.impl)
        logits = widened(model.heads[self.name](states)).squeeze(1)
        covered = asked.covered.to(logits.dtype)
        total = F.binary_cross_entropy_with_logits(logits, covered, reduction="sum")
        return total, (logits.detach() > 0) == (covered > 0)

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Cross-entropy and accuracy, and those of how many words are covered."""
        loss, right, covered, count = 0.0, 0, 0, 0
        for batch in held_out.batches(self.name):
            total, found = self._compared(model, batch)
            loss, right, count = loss + total.item(), right + int(found.sum()), count + len(found)
            covered += int(batch.views[self.name].covered.sum())
        require_some(count, "words that may be covered")
        share = covered / count
        figures = {"loss": loss / count, "loss_class_prior": binary_entropy(torch.tensor(share)).item()}
        return {self.name: figures | {"accuracy": right / count, "accuracy_majority": max(share, 1 - share)}}
