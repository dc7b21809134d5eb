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
    rows_at_once = max(1, LOGITS_AT_ONCE // len(image))
    own, best_text, best_image = [], [], []
    for first in range(0, len(image), rows_at_once):
        similarity = image[first : first + rows_at_once] @ text.T
        own.append(similarity.diagonal(first))
        best_text.append(similarity.amax(1))
        best_image.append(similarity.amax(0))
    mine, nearest_image = torch.cat(own), torch.stack(best_image).amax(0)
    hits = (torch.cat(best_text) <= mine).float().mean() + (nearest_image <= mine).float().mean()
    return hits / 2
