"""Image-text matching with images replaced at random (ITM), and word-region alignment (WRA)."""

from __future__ import annotations

from dataclasses import dataclass

import vlkernels as vk
from torch import Tensor
from torch.nn import functional as F

from engine.batch import IMAGE, TEXT, Batch
from engine.models import OneStream
from engine.models.transformer import Tokens
from engine.objectives.normalization import normalizer, widened


@dataclass(frozen=True)
class RandomMatchingObjective:
    """Two-way cross-entropy: is the image the caption's own? And `alignment` times the optimal-transport
    distance between words and regions of own pairs, less that of replaced ones.

    Both are means over all pairs. The named losses are what enters the total, so the second contains its
    factor; the report has the mean distances themselves.
    """

    alignment: float = 0.1

    def __call__(self, model: OneStream, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        read, own, factor = model.encode(batch), batch.own_image, normalizer(batch, "pairs")
        logits = widened(model.matching_logits(read))
        losses = {"random_matching": F.cross_entropy(logits, own, reduction="sum") * factor}
        report = {"matching_accuracy": (logits.detach().argmax(1) == own).float().mean()}
        if self.alignment > 0:
            distance = transport_distance(model, read)
            signed = (2 * own - 1) * distance
            losses["word_region_alignment"] = self.alignment * signed.sum() * factor
            report["transport_own"] = _mean_where(own == 1, distance.detach())
            report["transport_replaced"] = _mean_where(own == 0, distance.detach())
        return losses, report


def transport_distance(model: OneStream, read: Tokens) -> Tensor:
    """float32 `[B]`: cost of moving each caption, [CLS] and [SEP] included, to its regions."""
    return vk.optimal_transport(
        read.hidden,
        read.hidden,
        image_layout=read.layout,
        text_layout=read.layout,
        image_segment=IMAGE,
        text_segment=TEXT,
        impl=model.impl,
    )


def _mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    """0 where none is chosen."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)
