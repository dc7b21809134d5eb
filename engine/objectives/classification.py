"""Classification of pictures, pages or texts."""

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
from engine.sections import require, require_share


@dataclass
class Classification(Objective):
    """Cross-entropy of the class that a sample shows, from what stands for the sample (ViT)."""

    roles: ClassVar[tuple[str, ...]] = ("joint or text or image",)

    classes: int = 1000
    """Number of classes of the data."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""

    def __post_init__(self) -> None:
        require(self.classes >= 2, f"objectives.classification.classes must be at least 2, got {self.classes}")
        require_share("objectives.classification.label_smoothing", self.label_smoothing)

    def prepare(self, sample: Sample, draw: Draw) -> None:
        count = len(sample.classes)
        require(count == 1, f"{count} classes, classification needs one: document_classes takes several")
        (label,) = sample.classes
        require(label < self.classes, f"class {label}, objectives.classification.classes is {self.classes}")
        sample.views[self.name] = label

    def build_head(self, model: Any) -> nn.Module:
        return pooled_head(model, self.classes)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        labels = batch.views[self.name]
        logits = model.heads[self.name](pooled_states(model, batch))
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        right = (logits.detach().argmax(1) == labels).float().mean()
        return {self.name: total * normalizer(batch, "pairs")}, {"classification_accuracy": right}

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Cross-entropy of the classes and how many are found; and those of always saying how frequent each is."""
        loss, right, prior = 0.0, 0, ClassPrior()
        for batch in held_out.batches(self.name):
            labels = batch.views[self.name]
            logits = model.heads[self.name](pooled_states(model, batch))
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
            prior.add(F.one_hot(labels, self.classes))
        require_some(prior.count, "samples with a class")
        figures = {"loss": loss / prior.count, "loss_class_prior": prior.divergence}
        return {self.name: figures | {"accuracy": right / prior.count, "accuracy_most_frequent": prior.largest_share}}
