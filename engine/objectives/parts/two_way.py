"""Two-way classification of whole samples, from what stands for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.nn import functional as F

from engine.batch import Batch
from engine.objectives.parts.baselines import ClassPrior
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer
from engine.objectives.parts.objective import Losses, Objective, Report
from engine.objectives.parts.pooled import pooled_head, pooled_states
from engine.objectives.parts.words_view import WORDS, view_of_words

@dataclass
class TwoWayObjective(Objective):
    """The view of its name is the label, 0 or 1."""

    reads_whole: ClassVar[str | None] = WORDS
    what: ClassVar[str]
    """The samples, as a message names them."""

    def build_head(self, model: Any) -> nn.Module:
        return pooled_head(model, 2)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        labels = batch.views[self.name]
        logits = model.heads[self.name](pooled_states(model, batch, view_of_words(batch)))
        total = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.detach().argmax(1) == labels).float().mean()
        return {self.name: total * normalizer(batch, "pairs")}, {f"{self.name}_accuracy": right}

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Cross-entropy and accuracy, and those of the share of either kind."""
        loss, right, prior = 0.0, 0, ClassPrior()
        for batch in held_out.batches(self.name):
            losses, report = self(model, batch)
            loss += losses[self.name].item()
            right += round(report[f"{self.name}_accuracy"].item() * len(batch.labels))
            prior.add(F.one_hot(batch.views[self.name], 2))
        require_some(prior.count, self.what)
        figures = {"loss": loss / prior.count, "loss_class_prior": prior.divergence}
        return {self.name: figures | {"accuracy": right / prior.count, "accuracy_majority": prior.largest_share}}
