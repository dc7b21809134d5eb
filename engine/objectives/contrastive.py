"""Image-text contrastive loss (CLIP's InfoNCE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import vlkernels as vk
from torch import Tensor

from engine.batch import Batch
from engine.models import AlignAndFuse
from engine.objectives.batch_coupled import BatchCoupledObjective, Features, Losses, Report
from engine.objectives.normalization import negatives_group, rank_counts

LOGITS_AT_ONCE = 2**22


@dataclass(frozen=True)
class ContrastiveObjective(BatchCoupledObjective):
    """`negatives`: "global", against all pairs of the step, or "local", against those of this rank."""

    negatives: str = "global"

    def features(self, model: AlignAndFuse, batch: Batch) -> Features:
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
