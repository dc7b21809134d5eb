"""What a detector saw in masked regions: their classes (MRC, MRC-kl)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch, Sample
from engine.models import VisionLanguageModel
from engine.models.heads import HeadTransform
from engine.objectives.parts.baselines import ClassPrior
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.masked_regions import MaskedRegionObjective
from engine.objectives.parts.normalization import normalizer, widened
from engine.objectives.parts.objective import Draw, Losses, Report
from engine.sections import require


@dataclass
class MaskedRegionClasses(MaskedRegionObjective):
    """The detector's classes of masked regions (MRC).

    `soft`: KL(the detector's distribution || prediction), mean over regions and classes (so divided by their number
    too). `hard`: cross-entropy of the detector's best class that is not the background.
    """

    needs_soft_labels: ClassVar[bool] = True

    targets: Literal["soft", "hard"] = "soft"
    """soft: KL divergence from the detector's distribution (MRC-kl); hard: cross-entropy of its best class that is not
    the background."""

    def prepare(self, sample: Sample, draw: Draw) -> None:
        require(sample.soft_labels is not None, "no soft labels, which masked_region_classes needs")
        super().prepare(sample, draw)
        masked = sample.views[self.name]
        masked.soft_labels = torch.from_numpy(sample.soft_labels[masked.places.offsets.numpy()])

    def build_head(self, model: VisionLanguageModel) -> nn.Module:
        stack = model.region_stack
        return RegionClassHead(stack.width, model.regions.classes, stack.activation, stack.eps, model.impl)

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Losses, Report]:
        logits = self.logits(model, batch)
        labels = batch.views[self.name].soft_labels.to(logits.dtype)
        total = (soft_divergence if self.targets == "soft" else hard_error)(logits, labels)
        return {self.name: total * normalizer(batch, self.name)}, {}

    def logits(self, model: VisionLanguageModel, batch: Batch) -> Tensor:
        """`[M, C]`."""
        return widened(model.heads[self.name].logits(model.masked_states(batch, self.name)))

    def measure(self, model: VisionLanguageModel, held_out: HeldOut) -> Figures:
        """Divergence from the detector's distributions over classes, and that of their mean. For hard targets the
        cross-entropy, and how often the class is found, or would be by naming the most frequent one."""
        loss, right, prior = 0.0, 0, ClassPrior()
        for batch in held_out.batches(self.name):
            labels = batch.views[self.name].soft_labels
            with model.passes_shared():
                loss += self(model, batch)[0][self.name].item()
                if self.targets == "hard":
                    best = best_classes(labels)
                    right += int((self.logits(model, batch).argmax(1) == best).sum())
                    labels = F.one_hot(best, labels.shape[1])
            prior.add(labels)
        require_some(prior.count, "masked regions")
        per_label = 1 if self.targets == "hard" else labels.shape[1]  # the soft loss is a mean over classes, too
        figures = {"loss": loss / prior.count, "loss_class_prior": prior.divergence / per_label}
        if self.targets == "hard":
            figures |= {"accuracy": right / prior.count, "accuracy_most_frequent": prior.largest_share}
        return {self.name: figures}


class RegionClassHead(HeadTransform):
    """The transform, then a linear map to the detector's classes."""

    def __init__(self, width: int, classes: int, activation: str, eps: float, impl: str):
        super().__init__(width, width, activation, eps, impl)
        self.classifier = nn.Linear(width, classes)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.classifier(self(hidden))


def best_classes(labels: Tensor) -> Tensor:
    """The most probable class of each distribution that is not the background, class 0."""
    return labels[:, 1:].argmax(1) + 1


def soft_divergence(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over regions of the mean over classes."""
    return F.kl_div(logits.log_softmax(1), labels, reduction="sum") / labels.shape[1]


def hard_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over regions."""
    return F.cross_entropy(logits, best_classes(labels), reduction="sum")
