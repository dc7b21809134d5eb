"""What a detector saw in masked regions: their features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.models.heads import HeadTransform
from engine.objectives.parts.baselines import MeanRegion
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.masked_regions import MaskedRegionObjective
from engine.objectives.parts.normalization import normalizer, widened
from engine.objectives.parts.objective import Losses, Report


@dataclass
class MaskedRegionFeatures(MaskedRegionObjective):
    """Regression of the features of masked regions (MRFR).

    Squared error, mean over all elements (so divided by the size of a feature too).
    """

    roles: ClassVar[tuple[str, ...]] = ("joint",)

    def build_head(self, model: VisionLanguageModel) -> nn.Module:
        stack = model.last_stack
        return RegionFeatureHead(stack.width, model.regions.feature_values, stack.activation, stack.eps, model.impl)

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Losses, Report]:
        hidden = model.masked_states(batch, self.name)
        embedding = model.joint.image.feature_projection.weight
        predicted = widened(model.heads[self.name].features(hidden, embedding))
        targets = self.targets(batch).to(predicted.dtype)
        total = F.mse_loss(predicted, targets, reduction="sum") / targets.shape[1]
        return {self.name: total * normalizer(batch, self.name)}, {}

    def targets(self, batch: Batch) -> Tensor:
        """`[M, F]`: the features of the masked regions."""
        return batch.image.features[batch.views[self.name].places.rows(batch.image_layout)]

    def measure(self, model: VisionLanguageModel, held_out: HeldOut) -> Figures:
        """Squared error of the features, and that of their mean."""
        loss, mean = 0.0, MeanRegion()
        for batch in held_out.batches(self.name):
            loss += self(model, batch)[0][self.name].item()
            mean.add(self.targets(batch))
        require_some(mean.count, "masked regions")
        return {self.name: {"loss": loss / mean.count, "loss_mean_region": mean.squared_error}}


class RegionFeatureHead(HeadTransform):
    """The transform, then the transposed map that embeds features as decoder, with a bias per value."""

    def __init__(self, width: int, feature_values: int, activation: str, eps: float, impl: str):
        super().__init__(width, width, activation, eps, impl)
        self.bias = nn.Parameter(torch.zeros(feature_values))

    def features(self, hidden: Tensor, projection: Tensor) -> Tensor:
        """`[M, F]`; `projection` `[D, F]` is the weight of the embedding map."""
        return F.linear(self(hidden), projection.T, self.bias)
