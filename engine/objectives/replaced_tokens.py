"""Replaced-token detection (ELECTRA): which tokens of a text are a generator's guesses?"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch, MaskedWords, Places, Sample
from engine.corruption.words import corrupt, masked
from engine.models.heads import MaskedLanguageHead
from engine.models.passes import drawn_as
from engine.models.transformer import ACTIVATIONS, SelectedRows
from engine.objectives.parts.all_tokens import AllTokens
from engine.objectives.parts.baselines import ClassPrior, Unigrams
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer, widened
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.sections import require_share

MASKED = 0.85  # share of the selected tokens that the generator does not see
DRAW_BITS, SHARE_BITS = 31, 30
CHUNK = 2**23  # logits that are there at once


@dataclass
class HiddenWords(MaskedWords):
    """Masked words, and what the guesses at them are drawn by."""

    draws: Tensor
    """int64 [M], evenly in [0, 2^31): whole numbers keep all their digits in every precision."""


@dataclass
class ReplacedTokens(Objective):
    """A generator's guesses at masked words, told from the words of the text (ELECTRA).

    The generator learns from masked words; what it would say stands in the text that the text role judges token by token.
    No gradient goes through the guesses.
    """

    roles: ClassVar[tuple[str, ...]] = ("text", "generator")

    probability: float = 0.15
    """Share of tokens that the generator guesses."""
    detection: float = 50.0
    """Factor on the loss of the judgements, beside the generator's own."""

    def __post_init__(self) -> None:
        require_share("objectives.replaced_tokens.probability", self.probability)

    @property
    def _all(self) -> str:
        """Name of the second view."""
        return f"{self.name}_all"

    def prepare(self, sample: Sample, draw: Draw) -> None:
        text, random = sample.text, draw.random
        _, selected = corrupt(text.ids, text.words, draw.tokenizer, self.probability, False, random)
        ids = masked(text.ids, selected[random.random(selected.size) < MASKED], draw.tokenizer.mask_id)
        draws, places = random.integers(2**DRAW_BITS, size=selected.size), Places.of_sample(selected)
        seen, targets, by = (torch.from_numpy(part) for part in (ids, text.ids[selected], draws))
        sample.views[self.name] = HiddenWords(seen, places, targets, by)
        sample.views[self._all] = AllTokens(torch.from_numpy(text.ids))

    def build_head(self, model: Any) -> nn.Module:
        return DetectionHead(model)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        words, logits, replaced = self._read(model, batch)
        detected = F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="sum")
        losses = {
            "generated_words": words * normalizer(batch, self.name),
            self.name: self.detection * detected * normalizer(batch, self._all),
        }
        right = ((logits.detach() > 0) == replaced).float().mean()
        return losses, {"replaced_accuracy": right, "replaced_share": replaced.float().mean()}

    def guesses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the generator's cross-entropies, and the ids `[T]` of the texts with its guesses."""
        hidden, head, table = batch.views[self.name], model.heads[self.name].words, model.words_of("generator")
        layout = drawn_as(batch.text.layout, batch, self.name)
        rows = hidden.places.rows(layout)
        selected = SelectedRows.of(rows, hidden.places.samples, layout)
        states = model.generator_states(batch, self.name, selected).hidden
        with torch.no_grad():
            chunks = (part.split(max(1, CHUNK // len(table))) for part in (states, hidden.draws))
            guessed = [drawn(head.logits(some, table), by) for some, by in zip(*chunks, strict=True)]
        return head.loss(states, hidden.targets, table), batch.text.ids.index_copy(0, rows, torch.cat(guessed))

    def _read(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The generator's loss, and of every token the logit of being replaced, and whether it is."""
        words, ids = self.guesses(model, batch)
        text = dataclasses.replace(batch.text, ids=ids)
        states = model.text(text, drawn_as(text.layout, batch, self.name), model.rng).hidden
        return words, model.heads[self.name](states), ids != batch.text.ids

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Of the generator beside the words' frequencies, of the judgements beside the share of replaced words: that the ends of a
        text, which are no words, stay is known blindly."""
        totals, unigrams, prior = Counter(), Unigrams(len(model.words_of("generator"))), ClassPrior()
        for batch in held_out.batches(self.name):
            words, logits, replaced = self._read(model, batch)
            totals["words"] += words.item()
            loss = F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="sum")
            totals["detected"] += loss.item()
            totals["right"] += int(((logits > 0) == replaced).sum())
            unigrams.add(batch.views[self.name].targets)
            totals["tokens"] += len(replaced)
            prior.add(F.one_hot(replaced[between_ends(batch.text.layout)].long(), 2))
        require_some(unigrams.count, "masked words")
        inner, tokens = prior.count, totals["tokens"]
        judged = {"loss": totals["detected"] / tokens, "loss_class_prior": prior.divergence * inner / tokens}
        judged |= {"accuracy": totals["right"] / tokens, "accuracy_majority": 1 - (1 - prior.largest_share) * inner / tokens}
        guessed = {"loss": totals["words"] / unigrams.count, "loss_unigram": unigrams.entropy}
        return {self.name: judged, "generated_words": guessed}


def between_ends(layout: vk.SegmentLayout) -> Tensor:
    """bool `[T]`: neither the first nor the last token of its text."""
    position, length = layout.token_position(), layout.lengths.sum(1)[layout.token_sample()]
    return (position > 0) & (position < length - 1)


class DetectionHead(nn.Module):
    """The generator's head for words, and a map of the text role's states to whether a token was replaced."""

    def __init__(self, model: Any):
        super().__init__()
        own, small, (vocab_size, width) = model.options.text, model.options.generator, model.words_of("generator").shape
        self.words = MaskedLanguageHead(small.width, width, vocab_size, small.activation, small.eps, model.impl)
        self.transform = nn.Linear(own.width, own.width)
        self.activation = ACTIVATIONS[own.activation]
        self.replaced = nn.Linear(own.width, 1)

    def forward(self, states: Tensor) -> Tensor:
        """`[T]`: logits of being replaced."""
        return widened(self.replaced(self.activation(self.transform(states)))[:, 0])


def drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """int64 `[M]`: a word of each row's softmax, the one whose share of the whole its draw falls in.

    Shares are whole numbers, whose running sums are the same bits in any order.
    """
    shares = (widened(logits).softmax(1) * 2**SHARE_BITS).long()
    ends = shares.cumsum(1)
    place = (draws * ends[:, -1]) >> DRAW_BITS
    return torch.searchsorted(ends, place[:, None], right=True)[:, 0]
