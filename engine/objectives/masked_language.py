"""Masked-language modelling."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from engine.batch import Batch, MaskedWords, Places, Sample
from engine.corruption.words import corrupt
from engine.models import VisionLanguageModel
from engine.models.heads import MaskedLanguageHead
from engine.objectives.parts.baselines import Unigrams
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer
from engine.objectives.parts.momentum import check_distillation, risen
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.objectives.parts.other_images import other_images, with_images, with_pages
from engine.objectives.parts.pages import blank_boxes, require_pixels
from engine.sections import require, require_share


@dataclass
class MaskedLanguage(Objective):
    """Masked-language modelling of the text, beside its image where it has one (MLM).

    Cross-entropy of the words that stood where the text was corrupted, mean over these places.
    """

    roles: ClassVar[tuple[str, ...]] = ("fusion or joint or text",)

    probability: float = 0.15
    """Share of tokens that are predicted."""
    whole_word: bool = False
    """Select whole words instead of single tokens."""
    when_none: Literal["any", "first"] = "any"
    """Where the draw selects nothing. any: one is drawn, with the fate of all; first: the first token is masked, as
    UNITER does."""
    blank_words: bool = False
    """Blank the selected words in the picture of their page too (LayoutLMv2)."""
    distillation: float = 0.0
    """Share of each target that is what a momentum copy of the model finds (ALBEF: 0.4)."""
    ramp: float = 0.0
    """Part of the run over which that share rises from 0 (ALBEF: the first of 30 epochs)."""

    def __post_init__(self) -> None:
        require_share("objectives.masked_language.probability", self.probability)
        check_distillation(self)

    @property
    def taught_by(self) -> tuple[str, ...]:
        return ("image", "text", "fusion", "co_attention", "joint", f"heads.{self.head}") if self.distillation else ()

    def check(self, config: Any) -> None:
        super().check(config)
        if self.blank_words:
            require_pixels(config, "objectives.masked_language.blank_words")

    def prepare(self, sample: Sample, draw: Draw) -> None:
        text = sample.text
        how = (self.probability, self.whole_word, draw.random, self.when_none)
        ids, selected = corrupt(text.ids, text.words, draw.tokenizer, *how)
        if self.blank_words:
            require(text.boxes is not None, "a text without boxes, objectives.masked_language.blank_words needs pages")
            blank_boxes(sample, text.boxes[selected])
        targets = torch.from_numpy(text.ids[selected])
        sample.views[self.name] = MaskedWords(torch.from_numpy(ids), Places.of_sample(selected), targets)

    def build_head(self, model: VisionLanguageModel) -> nn.Module:
        stack, (vocab_size, width) = model.last_stack, model.words.shape
        return MaskedLanguageHead(stack.width, width, vocab_size, stack.activation, stack.eps, model.impl)

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Losses, Report]:
        total = self.total(model, batch, risen(self.distillation, self.ramp, batch.progress))
        return {self.name: total * normalizer(batch, self.name)}, {}

    def total(self, model: VisionLanguageModel, batch: Batch, distillation: float) -> Tensor:
        """Sum over the masked words."""
        states, targets = model.masked_states(batch, self.name), batch.views[self.name].targets
        taught = {}
        if distillation:
            taught = {"teacher": self._teacher(model.teacher.module, batch), "distillation": distillation}
        return model.heads[self.head].loss(states, targets, model.words, **taught)

    @torch.no_grad()
    def _teacher(self, copied: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the momentum copy's decoder reads, and its table and bias."""
        head = copied.heads[self.head]
        return head(copied.masked_states(batch, self.name)), copied.words, head.bias

    def measure(self, model: VisionLanguageModel, held_out: HeldOut) -> Figures:
        """Found beside what the frequencies of the words tell; and beside another image of the batch, or laid out as another
        page of it."""
        totals, unigrams = Counter(), Unigrams(len(model.words))
        for batch in held_out.batches(self.name):
            seen = {"": batch}
            on_pages = batch.text.boxes is not None
            if on_pages or batch.image is not None:
                if (others := other_images(batch.labels)) is None:
                    continue
                name, replaced = ("page", with_pages) if on_pages else ("image", with_images)
                seen[f"_shuffled_{name}"] = replaced(batch, others)
            unigrams.add(batch.views[self.name].targets)
            for beside, one in seen.items():
                with model.passes_shared():
                    totals["loss" + beside] += self.total(model, one, 0.0).item()
                    totals["accuracy" + beside] += self.found(model, one)
        require_some(unigrams.count, "masked words beside two different images")
        figures = {name: total / unigrams.count for name, total in totals.items()}
        figures |= {"loss_unigram": unigrams.entropy, "accuracy_chance": 1 / len(model.words)}
        return {self.name: figures}

    def found(self, model: VisionLanguageModel, batch: Batch) -> float:
        """How many masked words have the highest logit."""
        states, targets = model.masked_states(batch, self.name), batch.views[self.name].targets
        return (self.logits(model, states).argmax(1) == targets).sum().item()

    def logits(self, model: VisionLanguageModel, states: Tensor) -> Tensor:
        """`[M, V]`."""
        return model.heads[self.head].logits(states, model.words)
