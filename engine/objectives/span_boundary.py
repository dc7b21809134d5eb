"""Masked spans, whose words are also told from the tokens on either side (SpanBERT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.batch import Batch, MaskedWords, Places, Sample
from engine.corruption.spans import LONGEST, mask_spans
from engine.models.heads import HeadTransform, MaskedLanguageHead
from engine.objectives.parts.baselines import Unigrams
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.sections import require_share

POSITION_WIDTH = 200


@dataclass
class HiddenSpans(MaskedWords):
    """Masked words that lie in spans."""

    left: Places
    """The token before the span of each word."""
    right: Places
    """The token behind it."""
    offsets: Tensor
    """int64 [M]: place within the span, from 0."""


@dataclass
class SpanBoundary(Objective):
    """Masked spans of words, each word predicted from its own state (MLM) and from the tokens around its span (SBO)."""

    roles: ClassVar[tuple[str, ...]] = ("joint or text",)

    probability: float = 0.15
    """Share of tokens that are predicted."""

    def __post_init__(self) -> None:
        require_share("objectives.span_boundary.probability", self.probability)

    def prepare(self, sample: Sample, draw: Draw) -> None:
        text = sample.text
        spans = mask_spans(text.ids, text.words, draw.tokenizer, self.probability, draw.random)
        own, left, right = (Places.of_sample(part) for part in (spans.selected, spans.left, spans.right))
        ids, targets, offsets = (
            torch.from_numpy(part) for part in (spans.ids, text.ids[spans.selected], spans.offsets)
        )
        sample.views[self.name] = HiddenSpans(ids, own, targets, left, right, offsets)

    def build_head(self, model: Any) -> nn.Module:
        return SpanHead(model)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        factor = normalizer(batch, self.name)
        own, boundary = self._totals(model, batch)
        return {"span_words": own * factor, "span_boundary": boundary * factor}, {}

    def _totals(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums over the words: from their own states, from those around their spans."""
        spans, head = batch.views[self.name], model.heads[self.name]
        own, left, right = self._states(model, batch)
        around = head.around(left, right, spans.offsets)
        return tuple(
            part.loss(states, spans.targets, model.words) for part, states in ((head.own, own), (head.boundary, around))
        )

    def _states(self, model: Any, batch: Batch) -> list[Tensor]:
        """`[M, D]` each: of the words, of the tokens before and behind their spans."""
        spans, joint = batch.views[self.name], model.joint is not None
        read = (model.joint_states if joint else model.text_states)(batch, self.name)
        segment = model.joint.segment("text") if joint else 0
        places = (spans.places, spans.left, spans.right)
        return [vk.take_rows(read.hidden, one.rows(read.layout, segment), impl=model.impl) for one in places]

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Cross-entropies beside that of the words' frequencies."""
        own, boundary, unigrams = 0.0, 0.0, Unigrams(len(model.words))
        for batch in held_out.batches(self.name):
            totals = self._totals(model, batch)
            own, boundary = own + totals[0].item(), boundary + totals[1].item()
            unigrams.add(batch.views[self.name].targets)
        require_some(unigrams.count, "masked words")
        totals = {"span_words": own, "span_boundary": boundary}
        return {name: {"loss": total / unigrams.count, "loss_unigram": unigrams.entropy} for name, total in totals.items()}


class SpanHead(nn.Module):
    """BERT's head for the words, and one that reads two neighbours and a place."""

    def __init__(self, model: Any):
        super().__init__()
        stack, (vocab_size, width) = model.last_stack, model.words.shape
        options = (stack.activation, stack.eps, model.impl)
        self.own = MaskedLanguageHead(stack.width, width, vocab_size, *options)
        self.positions = nn.Parameter(torch.empty(LONGEST, POSITION_WIDTH))
        self.neighbours = HeadTransform(2 * stack.width + POSITION_WIDTH, stack.width, *options)
        self.boundary = MaskedLanguageHead(stack.width, width, vocab_size, *options)

    def around(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        """`[M, D]`: what the neighbours of a span say of a place in it."""
        return self.neighbours(torch.cat((left, right, self.positions[offsets]), dim=1))
