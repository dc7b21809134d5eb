"""What a detector saw in masked regions: their features (MRFR), their classes (MRC, MRC-kl)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import vlkernels as vk
from torch import Tensor
from torch.nn import functional as F

from engine.batch import IMAGE, Batch
from engine.models import OneStream
from engine.objectives.normalization import normalizer, widened


def masked_states(model: OneStream, batch: Batch) -> Tensor:
    """`[M, D]`: the states of the masked regions."""
    read = model.encode(batch, masked=IMAGE)
    rows = batch.masked_regions.places.rows(read.layout, IMAGE)
    return vk.take_rows(read.hidden, rows, impl=model.impl)


@dataclass(frozen=True)
class MaskedRegionFeaturesObjective:
    """Squared error of the predicted features, mean over all their elements (so divided by their size
    too)."""

    def __call__(self, model: OneStream, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        predicted = widened(model.region_features(masked_states(model, batch)))
        rows = batch.masked_regions.places.rows(batch.image_layout)
        targets = batch.image.features[rows].to(predicted.dtype)
        total = F.mse_loss(predicted, targets, reduction="sum") / targets.shape[1]
        return {"masked_region_features": total * normalizer(batch, "masked_regions")}, {}


@dataclass(frozen=True)
class MaskedRegionClassesObjective:
    """`soft`: KL(the detector's distribution || prediction), mean over regions and classes (so divided by
    their number too). `hard`: cross-entropy of the detector's best class that is not the background."""

    targets: Literal["soft", "hard"] = "soft"

    def __call__(self, model: OneStream, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logits = class_logits(model, batch)
        labels = batch.masked_regions.soft_labels.to(logits.dtype)
        total = (soft_divergence if self.targets == "soft" else hard_error)(logits, labels)
        return {"masked_region_classes": total * normalizer(batch, "masked_regions")}, {}


def class_logits(model: OneStream, batch: Batch) -> Tensor:
    """`[M, C]`: the classes of the masked regions."""
    return widened(model.region_class_head.logits(masked_states(model, batch)))


def best_classes(labels: Tensor) -> Tensor:
    """The most probable class of each distribution that is not the background, class 0."""
    return labels[:, 1:].argmax(1) + 1


def soft_divergence(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over regions of the mean over classes."""
    return F.kl_div(logits.log_softmax(1), labels, reduction="sum") / labels.shape[1]


def hard_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over regions."""
    return F.cross_entropy(logits, best_classes(labels), reduction="sum")
