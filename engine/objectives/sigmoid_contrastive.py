"""Image-text sigmoid loss (SigLIP)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vlkernels as vk
from torch import nn

from engine.batch import Batch
from engine.objectives.parts.batch_coupled import BatchCoupledObjective, Features
from engine.objectives.parts.held_out import Figures, HeldOut
from engine.objectives.parts.normalization import negatives_group, rank_counts
from engine.objectives.parts.objective import Losses, Report
from engine.objectives.parts.retrieval import retrieval


@dataclass
class SigmoidContrastive(BatchCoupledObjective):
    """Image-text sigmoid loss: is each text of the step each image's own (SigLIP)?

    Its factor on similarities begins with `model.logit_scale_init` (SigLIP: 10).
    """

    roles: ClassVar[tuple[str, ...]] = ("image", "text")
    reads_scale: ClassVar[bool] = True

    bias: float = -10.0
    """What the number that is added to all logits begins with."""

    def build_head(self, model: Any) -> nn.Module:
        return LogitBias(self.bias)

    def features(self, model: Any, batch: Batch) -> Features:
        rows = {"image": model.image_features(batch), "text": model.text_features(batch)}
        return Features(rows, {"scale": model.scale(), "bias": model.heads[self.name]()})

    def loss(self, features: Features, impl: str) -> tuple[Losses, Report]:
        (image, text), numbers = (features.rows[name] for name in ("image", "text")), features.numbers
        group = negatives_group("global")
        options = {"group": group, "rank_counts": rank_counts(len(image), group), "rank_reduction": "mean", "impl": impl}
        loss = vk.sigmoid_loss(image, text, numbers["scale"], logit_bias=numbers["bias"], **options)
        report = {"logit_scale": numbers["scale"].detach()[0], "logit_bias": numbers["bias"].detach()[0]}
        return {self.name: loss}, report

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Recall both ways among the gallery, beside chance; and the loss over it, beside that of the share of partners
        as the answer for every pair."""
        gallery, bias = held_out.gallery, model.heads[self.name]()
        options = {"logit_bias": bias, "impl": model.impl}
        loss = vk.sigmoid_loss(gallery.image_features, gallery.text_features, model.scale(), **options)
        share = 1 / len(gallery)
        blind = -(math.log(share) + (len(gallery) - 1) * math.log1p(-share)) if len(gallery) > 1 else 0.0
        losses = {"loss": loss.item(), "loss_share_of_partners": blind}
        return {self.name: retrieval(gallery), f"{self.name}_loss": losses}


class LogitBias(nn.Module):
    """One learned number."""

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))

    def forward(self) -> torch.Tensor:
        return self.value * 1
