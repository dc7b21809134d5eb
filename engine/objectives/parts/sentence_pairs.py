"""Two-way classification of texts of two segments: are they as in their document?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.nn import functional as F

from engine.batch import Batch, Sample
from engine.objectives.parts.baselines import ClassPrior
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.objectives.parts.pooled import pooled_head, pooled_states
from engine.sections import require

BESIDE = "masked_language"
"""Where a batch has masked words too, the pair is read as they have left it: one text for both losses (BERT)."""


@dataclass
class SentencePairObjective(Objective):
    """The data decide which pairs there are; the label is 0 where they are as in their document."""

    roles: ClassVar[tuple[str, ...]] = ("joint or text",)
    reads_whole: ClassVar[str | None] = BESIDE

    def check(self, config: Any) -> None:
        super().check(config)
        found = config.data.documents
        require(found == self.name, f"objectives.{self.name} needs data.documents {self.name}, got {found}")

    def prepare(self, sample: Sample, draw: Draw) -> None:
        require(sample.pair is not None, f"a text of one segment, {self.name} needs two")
        sample.views[self.name] = sample.pair

    def build_head(self, model: Any) -> nn.Module:
        return pooled_head(model, 2)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        labels, view = batch.views[self.name], BESIDE if BESIDE in batch.views else None
        logits = model.heads[self.name](pooled_states(model, batch, view))
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
        require_some(prior.count, "pairs of segments")
        figures = {"loss": loss / prior.count, "loss_class_prior": prior.divergence}
        return {self.name: figures | {"accuracy": right / prior.count, "accuracy_majority": prior.largest_share}}
