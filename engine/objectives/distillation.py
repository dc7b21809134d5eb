"""Distillation of a text role from a deeper, frozen one (DistilBERT)."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch, MaskedWords, Places, Sample
from engine.corruption.words import corrupt
from engine.models.heads import MaskedLanguageHead
from engine.models.passes import drawn_as
from engine.models.roles import TextTower
from engine.models.transformer import Tokens
from engine.models.views import text_of
from engine.objectives.parts.all_tokens import AllTokens
from engine.objectives.parts.baselines import Unigrams
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer, widened
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.sections import TextStack, require, require_positive, require_share

DEEPER = 2
"""The teacher has so many layers for one of the student's, which begins as the first of them."""
TYPES = 2  # of the teacher's tokens; all are of the first


@dataclass
class Distillation(Objective):
    """What a frozen BERT of twice the layers says of masked texts, and the masked words themselves (DistilBERT)."""

    roles: ClassVar[tuple[str, ...]] = ("text",)

    probability: float = 0.15
    """Share of tokens that are masked."""
    temperature: float = 2.0
    """Divides the logits of student and teacher before they are compared."""
    soft: float = 5.0
    """Factor on the cross-entropy with the teacher's words, mean over all tokens."""
    words: float = 2.0
    """Factor on that with the masked words, mean over these."""
    cosine: float = 1.0
    """Factor on 1 - the cosine between the states of both, mean over all tokens."""

    def __post_init__(self) -> None:
        require_share("objectives.distillation.probability", self.probability)
        require_positive(self, "objectives.distillation", "temperature")

    def check(self, config: Any) -> None:
        super().check(config)
        encoder = config.model.text.encoder
        require(encoder == "transformer", f"objectives.distillation needs model.text.encoder transformer, got {encoder}")

    @property
    def _all(self) -> str:
        """Name of the second view."""
        return f"{self.name}_all"

    def prepare(self, sample: Sample, draw: Draw) -> None:
        text = sample.text
        ids, selected = corrupt(text.ids, text.words, draw.tokenizer, self.probability, False, draw.random)
        seen, was, targets = (torch.from_numpy(part) for part in (ids, text.ids, text.ids[selected]))
        sample.views[self.name] = MaskedWords(seen, Places.of_sample(selected), targets)
        sample.views[self._all] = AllTokens(was)

    def build_head(self, model: Any) -> nn.Module:
        return StudentHead(model)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        soft, words, apart = self._totals(model, batch)
        all_tokens, some = normalizer(batch, self._all), normalizer(batch, self.name)
        return {
            self.name: self.soft * soft * all_tokens,
            "distilled_words": self.words * words * some,
            "distilled_states": self.cosine * apart * all_tokens,
        }, {}

    def _totals(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over tokens, masked words, tokens: of the soft and hard cross-entropies, of 1 - the cosines."""
        head, hidden = model.heads[self.name], batch.views[self.name]
        own, taught = self._read(model, batch)
        read, table, options = head.words(own.hidden), model.words, {"reduction": "sum", "impl": model.impl}
        soft = vk.linear_cross_entropy(
            read,
            table,
            batch.views[self._all].ids,  # without weight beside the teacher
            bias=head.words.bias,
            teacher=head.teacher.of(taught),
            distillation=1.0,
            temperature=self.temperature,
            **options,
        )
        rows = hidden.places.rows(own.layout)
        at = vk.take_rows(read, rows, impl=model.impl)
        words = vk.linear_cross_entropy(at, table, hidden.targets, bias=head.words.bias, **options)
        apart = 1 - F.cosine_similarity(widened(own.hidden), widened(taught), dim=1)
        return soft, words, apart.sum()

    def _read(self, model: Any, batch: Batch) -> tuple[Tokens, Tensor]:
        """The student's states of the masked texts, and the teacher's."""
        text = text_of(batch, self.name)
        layout = drawn_as(text.layout, batch, self.name)
        return model.text_states(batch, self.name), model.heads[self.name].teacher(text, layout, model.rng)

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Beside what is had of all tokens alike: the teacher's mean distribution, the words' frequencies, the mean of
        its directions. `lowest` is the cross-entropy of a student that is its teacher."""
        totals, unigrams, tokens = Counter(), Unigrams(len(model.words)), 0
        shares, directions = 0.0, 0.0
        teacher = model.heads[self.name].teacher
        for batch in held_out.batches(self.name):
            soft, words, apart = self._totals(model, batch)
            totals["soft"] += soft.item() / self.temperature**2
            totals["words"] += words.item()
            totals["apart"] += apart.item()
            _, taught = self._read(model, batch)
            said = torch.softmax(teacher.logits(taught) / self.temperature, dim=1)
            totals["own"] -= torch.xlogy(said, said).sum().item()
            shares = shares + said.sum(0, dtype=torch.float64)
            directions = directions + F.normalize(widened(taught), dim=1).sum(0)
            unigrams.add(batch.views[self.name].targets)
            tokens += len(taught)
        require_some(unigrams.count, "masked words")
        mean = shares / tokens
        figures = {"loss": totals["soft"] / tokens, "loss_mean_of_teacher": -torch.xlogy(mean, mean).sum().item()}
        hard = {"loss": totals["words"] / unigrams.count, "loss_unigram": unigrams.entropy}
        states = {"loss": totals["apart"] / tokens, "loss_mean_direction": 1 - directions.norm().item() / tokens}
        return {
            self.name: figures | {"lowest": totals["own"] / tokens},
            "distilled_words": hard,
            "distilled_states": states,
        }


class Teacher(nn.Module):
    """A BERT as deep as it was, which stands still: a text role and its head of words."""

    def __init__(self, options: TextStack, vocab_size: int, impl: str):
        super().__init__()
        deep = dataclasses.replace(options, layers=DEEPER * options.layers, types=TYPES)
        self.stack = deep
        self.text = TextTower(deep, vocab_size, itertools.count(), impl)
        width = self.text.embedder.words.shape[1]
        self.words = MaskedLanguageHead(deep.width, width, vocab_size, deep.activation, deep.eps, impl)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    def forward(self, *read: Any) -> Tensor:
        """`[T, D]`."""
        with torch.no_grad():
            return self.text(*read).hidden

    def of(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What it says of its states, as `vk.linear_cross_entropy` reads it."""
        with torch.no_grad():
            return self.words(states), self.text.embedder.words, self.words.bias

    def logits(self, states: Tensor) -> Tensor:
        """`[T, V]`."""
        return widened(self.words.logits(states, self.text.embedder.words))


class StudentHead(nn.Module):
    """The student's head of words, and its teacher."""

    def __init__(self, model: Any):
        super().__init__()
        stack, (vocab_size, width) = model.options.text, model.words.shape
        self.words = MaskedLanguageHead(stack.width, width, vocab_size, stack.activation, stack.eps, model.impl)
        self.teacher = Teacher(stack, vocab_size, model.impl)

    def begin(self, student: TextTower) -> None:
        """Take from the teacher what the student begins with: tables, head, the first of every two layers."""
        blocks = self.teacher.text.transformer.blocks[::DEEPER]
        parts = [(self.words, self.teacher.words), *zip(student.transformer.blocks, blocks, strict=True)]
        parts.append((student.embedder.norm, self.teacher.text.embedder.norm))
        for own, taught in parts:
            own.load_state_dict(taught.state_dict())
        with torch.no_grad():
            for name in ("words", "positions"):
                getattr(student.embedder, name).copy_(getattr(self.teacher.text.embedder, name))
