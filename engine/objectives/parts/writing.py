"""Texts that are written word by word, with the table that embeds the words."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch, OnDevice, Places
from engine.models.embedding.rows import table
from engine.models.heads import MaskedLanguageHead
from engine.models.transformer import Tokens
from engine.objectives.parts.baselines import Unigrams
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer
from engine.objectives.parts.objective import Losses, Objective, Report
from engine.sections import require_share


@dataclass
class NextWords(OnDevice):
    """What is to be said behind the tokens of a text, from its first one on."""

    places: Places
    targets: Tensor
    """int64 [M]: the ids."""

    def __len__(self) -> int:
        return len(self.places)

    @classmethod
    def of_sample(cls, targets: np.ndarray) -> NextWords:
        """Of a sample that is not in a batch yet."""
        return cls(Places.of_sample(np.arange(len(targets))), torch.from_numpy(targets))


@dataclass
class WritingObjective(Objective):
    """Cross-entropy of words, each from those before it and what the writer reads."""

    output: Literal["plain", "scaled", "transform", "own"] = "plain"
    """What is multiplied with the word table. plain: the states (GPT, BART); scaled: by 1 / sqrt(width) (T5); transform:
    behind BERT's linear map, activation and norm (BLIP); own: the states, with a table of the head's (T5 1.1)."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all words (BART, BLIP: 0.1)."""

    def __post_init__(self) -> None:
        require_share(f"objectives.{self.name}.label_smoothing", self.label_smoothing)

    def writer(self, model: Any) -> str:
        """The role that writes."""
        raise NotImplementedError

    def written(self, model: Any, batch: Batch) -> tuple[Tokens, int]:
        """The writer's pass, and the segment of its stream that is the text."""
        raise NotImplementedError

    def build_head(self, model: Any) -> nn.Module:
        role = self.writer(model)
        stack, (vocab_size, width) = getattr(model.options, role), model.words_of(role).shape
        if self.output == "transform":
            return MaskedLanguageHead(stack.width, width, vocab_size, stack.activation, stack.eps, model.impl)
        if self.output == "own":
            return OwnWordHead(vocab_size, stack.width, model.impl)
        return WordHead(1 / math.sqrt(stack.width) if self.output == "scaled" else 1.0, model.impl)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        total = self.total(model, batch, self.label_smoothing)
        return {self.name: total * normalizer(batch, self.name)}, {}

    def total(self, model: Any, batch: Batch, label_smoothing: float) -> Tensor:
        """Sum over the words."""
        table, targets = model.words_of(self.writer(model)), batch.views[self.name].targets
        return model.heads[self.name].loss(self.states(model, batch), targets, table, label_smoothing)

    def states(self, model: Any, batch: Batch) -> Tensor:
        """`[M, D]`: of the tokens behind which words are predicted."""
        read, segment = self.written(model, batch)
        rows = batch.views[self.name].places.rows(read.layout, segment)
        return vk.take_rows(read.hidden, rows, impl=model.impl)

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Cross-entropy per word and its exponential, beside those of the words' frequencies; how many are found."""
        table = model.words_of(self.writer(model))
        totals, unigrams = Counter(), Unigrams(len(table))
        for batch in held_out.batches(self.name):
            targets = batch.views[self.name].targets
            with model.passes_shared():
                totals["loss"] += self.total(model, batch, 0.0).item()
                logits = model.heads[self.name].logits(self.states(model, batch), table)
            totals["right"] += int((logits.argmax(1) == targets).sum())
            unigrams.add(targets)
        require_some(unigrams.count, "words")
        loss, entropy = totals["loss"] / unigrams.count, unigrams.entropy
        figures = {"loss": loss, "loss_unigram": entropy}
        figures |= {"perplexity": math.exp(loss), "perplexity_unigram": math.exp(entropy)}
        found = {"accuracy": totals["right"] / unigrams.count, "accuracy_most_frequent": unigrams.largest_share}
        return {self.name: figures | found}


class WordHead(nn.Module):
    """The word table as decoder of the states times `factor`."""

    def __init__(self, factor: float, impl: str):
        super().__init__()
        self.factor, self.impl = factor, impl

    def loss(self, hidden: Tensor, targets: Tensor, table: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Sum of the cross-entropies, in nats; the logits `[M, V]` are never stored."""
        options = {"label_smoothing": label_smoothing, "reduction": "sum", "impl": self.impl}
        return vk.linear_cross_entropy(hidden * self.factor, table, targets, **options)

    def logits(self, hidden: Tensor, table: Tensor) -> Tensor:
        return F.linear(hidden * self.factor, table)


class OwnWordHead(nn.Module):
    """A table of its own as decoder of the states."""

    def __init__(self, vocab_size: int, width: int, impl: str):
        super().__init__()
        self.words, self.impl, self.factor = table(vocab_size, width), impl, 1.0

    def forward(self, hidden: Tensor, targets: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
        """The logits `[M, V]`, or the sum of the cross-entropies of `targets`, for which those are never stored."""
        if targets is None:
            return F.linear(hidden, self.words)
        options = {"label_smoothing": label_smoothing, "reduction": "sum", "impl": self.impl}
        return vk.linear_cross_entropy(hidden, self.words, targets, **options)

    def loss(self, hidden: Tensor, targets: Tensor, table: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return self(hidden, targets, label_smoothing)

    def logits(self, hidden: Tensor, table: Tensor) -> Tensor:
        return self(hidden)
