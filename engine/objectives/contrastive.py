"""Image-text contrastive loss (CLIP's InfoNCE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import vlkernels as vk
from torch import Tensor

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.objectives.parts.batch_coupled import BatchCoupledObjective, Features
from engine.objectives.parts.held_out import Figures, HeldOut
from engine.objectives.parts.normalization import negatives_group, rank_counts
from engine.objectives.parts.objective import Losses, Report
from engine.objectives.parts.retrieval import contrast, retrieval

LOGITS_AT_ONCE = 2**22


@dataclass
class Contrastive(BatchCoupledObjective):
    """Image-text contrastive loss (ITC)."""

    roles: ClassVar[tuple[str, ...]] = ("image", "text")

    negatives: Literal["global", "local"] = "global"
    """global: against all pairs of the step; local: against those of this rank."""

    def features(self, model: VisionLanguageModel, batch: Batch) -> Features:
        rows = {"image": model.image_features(batch), "text": model.text_features(batch)}
        return Features(rows, {"scale": model.scale()})

    def loss(self, features: Features, impl: str) -> tuple[Losses, Report]:
        image, text, scale = features.rows["image"], features.rows["text"], features.numbers["scale"]
        group = negatives_group(self.negatives)
        counts = rank_counts(len(image), group)
        loss = vk.contrastive_loss(
            image, text, scale, group=group, rank_counts=counts, rank_reduction="mean", impl=impl
        )
        report = {
            "contrastive_accuracy": _accuracy(image.detach(), text.detach()),
            "logit_scale": scale.detach()[0],
        }
        return {"contrastive": loss}, report

    def measure(self, model: VisionLanguageModel, held_out: HeldOut) -> Figures:
        """Recall both ways among the gallery, beside chance; and the loss over it, beside that of equal similarities."""
        gallery = held_out.gallery
        logits = model.scale() * gallery.similarity
        return {"contrastive": retrieval(gallery), "contrastive_loss": contrast(logits, logits.T)}


def _accuracy(image: Tensor, text: Tensor) -> Tensor:
    """Share of this rank's images and texts whose own partner is their nearest on this rank."""
    pairs = len(image)
    own, best_text = image.new_empty(2, pairs)
    best_image = image.new_full((pairs,), -torch.inf)
    # One tile for all rows: memory of a fresh one each is not found again between the small results.
    tile = image.new_empty(min(pairs, max(1, LOGITS_AT_ONCE // pairs)), pairs)
    for first in range(0, pairs, len(tile)):
        rows = slice(first, min(first + len(tile), pairs))
        similarity = torch.mm(image[rows], text.T, out=tile[: rows.stop - first])
        own[rows] = similarity.diagonal(first)
        best_text[rows] = similarity.amax(1)
        best_image = torch.maximum(best_image, similarity.amax(0))
    return ((best_text <= own).float().mean() + (best_image <= own).float().mean()) / 2
