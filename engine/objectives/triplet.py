"""Image-text triplet loss (VSE++)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import vlkernels as vk

from engine.batch import Batch
from engine.objectives.parts.batch_coupled import BatchCoupledObjective, Features
from engine.objectives.parts.held_out import Figures, HeldOut
from engine.objectives.parts.normalization import negatives_group, rank_counts
from engine.objectives.parts.objective import Losses, Report
from engine.objectives.parts.retrieval import retrieval
from engine.sections import require_not_negative


@dataclass
class Triplet(BatchCoupledObjective):
    """Image-text triplet loss: partners are nearer than any other pair by a margin, sum over the step (VSE++)."""

    roles: ClassVar[tuple[str, ...]] = ("image", "text")

    margin: float = 0.2
    """How much more similar partners must be."""
    hardest: bool = True
    """The most similar wrong pair of every image and text alone (VSE++), or the sum over all (VSE0)."""

    def __post_init__(self) -> None:
        require_not_negative(self, "objectives.triplet", "margin")

    def features(self, model: Any, batch: Batch) -> Features:
        rows = {"image": model.image_features(batch), "text": model.text_features(batch), "labels": batch.labels}
        return Features(rows, {})

    def loss(self, features: Features, impl: str) -> tuple[Losses, Report]:
        image, text, labels = (features.rows[name] for name in ("image", "text", "labels"))
        group = negatives_group("global")
        options = {"group": group, "rank_counts": rank_counts(len(image), group), "rank_reduction": "mean", "impl": impl}
        loss = vk.triplet_loss(image, text, self.margin, hardest=self.hardest, labels=labels, **options)
        return {self.name: loss}, {}

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Recall both ways among the gallery, beside chance; and the loss over it, beside that of equal similarities."""
        gallery = held_out.gallery
        features, options = (gallery.image_features, gallery.text_features), {"hardest": self.hardest, "impl": model.impl}
        loss = vk.triplet_loss(*features, self.margin, labels=gallery.labels, **options)
        others = (~gallery.related).sum().item()
        alike = 2 * self.margin * (len(gallery) if self.hardest else others)
        return {self.name: retrieval(gallery), f"{self.name}_loss": {"loss": loss.item(), "loss_all_alike": alike}}
