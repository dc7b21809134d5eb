"""Image-text contrastive loss (CLIP's InfoNCE)."""

from __future__ import annotations

from dataclasses import dataclass

import vlkernels as vk
from torch import Tensor

from engine.batch import Batch
from engine.models import AlignAndFuse
from engine.objectives.normalization import negatives_group, rank_counts


@dataclass(frozen=True)
class ContrastiveObjective:
    """`negatives`: "global", against the pairs of all ranks, or "local"."""

    negatives: str = "global"

    def __call__(self, model: AlignAndFuse, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        image, text, scale = model.image_features(batch), model.text_features(batch), model.scale()
        group = negatives_group(self.negatives)
        counts = rank_counts(batch, group)
        loss = vk.contrastive_loss(
            image, text, scale, group=group, rank_counts=counts, rank_reduction="mean", impl=model.impl
        )
        report = {
            "contrastive_accuracy": _accuracy(image.detach(), text.detach()),
            "logit_scale": scale.detach()[0],
        }
        return {"contrastive": loss}, report


def _accuracy(image: Tensor, text: Tensor) -> Tensor:
    """Share of this rank's images and texts whose own partner is their nearest on this rank."""
    similarity = image @ text.T
    own = similarity.diagonal()
    hits = (similarity.amax(1) <= own).float().mean() + (similarity.amax(0) <= own).float().mean()
    return hits / 2
