"""Multi-label document classification (MDC)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch, Sample
from engine.objectives.parts.baselines import binary_entropy
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.objectives.parts.pooled import pooled_head, pooled_states
from engine.sections import require


@dataclass
class DocumentClasses(Objective):
    """Several classes of a page at once, from what stands for it (MDC).

    Binary cross-entropy, mean over pages and classes.
    """

    roles: ClassVar[tuple[str, ...]] = ("joint or text or image",)

    classes: int = 16
    """Number of classes of the data."""

    def __post_init__(self) -> None:
        require(self.classes >= 1, f"objectives.document_classes.classes must be at least 1, got {self.classes}")

    def prepare(self, sample: Sample, draw: Draw) -> None:
        largest = max(sample.classes, default=0)
        require(largest < self.classes, f"class {largest}, objectives.document_classes.classes is {self.classes}")
        shown = torch.zeros(1, self.classes)
        shown[0, list(sample.classes)] = 1
        sample.views[self.name] = shown

    def build_head(self, model: Any) -> nn.Module:
        return pooled_head(model, self.classes)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        total, right = self._compared(model, batch)
        return {self.name: total * normalizer(batch, "pairs")}, {"document_classes_accuracy": right.float().mean()}

    def _compared(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over pages of the mean over classes, and `[B, C]`: is the likelier answer the right one?"""
        logits = model.heads[self.name](pooled_states(model, batch))
        shown = batch.views[self.name].to(logits.dtype)
        total = F.binary_cross_entropy_with_logits(logits, shown, reduction="sum") / self.classes
        return total, (logits.detach() > 0) == (shown > 0)

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Cross-entropy and accuracy, means over pages and classes; and those of how frequent each class is."""
        loss, right, pages = 0.0, 0, 0
        shown = torch.zeros(self.classes, dtype=torch.float64)
        for batch in held_out.batches(self.name):
            total, found = self._compared(model, batch)
            loss, right, pages = loss + total.item(), right + int(found.sum()), pages + len(found)
            shown += batch.views[self.name].sum(0).cpu()
        require_some(pages, "pages")
        share = shown / pages
        figures = {"loss": loss / pages, "loss_class_prior": binary_entropy(share).mean().item()}
        most = torch.maximum(share, 1 - share).mean().item()
        return {self.name: figures | {"accuracy": right / (pages * self.classes), "accuracy_most_frequent": most}}
