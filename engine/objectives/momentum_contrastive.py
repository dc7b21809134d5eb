"""Image-text contrastive loss against what a momentum copy has made of this batch and of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.models.momentum import FeatureQueue, require_whole_turns
from engine.objectives.parts.held_out import Figures, HeldOut
from engine.objectives.parts.momentum import check_distillation, risen
from engine.objectives.parts.normalization import negatives_group, rank_counts
from engine.objectives.parts.objective import Losses, Objective, Report
from engine.objectives.parts.retrieval import contrast, retrieval
from engine.sections import require_positive


@dataclass
class MomentumContrastive(Objective):
    """Image-text contrastive loss with a momentum copy and queues (ITC of ALBEF and BLIP).

    What is compared with a picture or a text are features that a momentum copy of the other tower made: of this
    micro-batch, and of the newest `queue` pairs of earlier steps. The copy's own similarities have a share in the targets.
    """

    roles: ClassVar[tuple[str, ...]] = ("image", "text")

    queue: int = 65_536
    """Pairs of earlier steps that are negatives; a multiple of train.global_batch."""
    negatives: Literal["global", "local"] = "global"
    """Of this micro-step. global: the pairs of all ranks; local: those of this rank alone, as released."""
    distillation: float = 0.4
    """Share of each target that is the softmax of the momentum copy's own similarities."""
    ramp: float = 0.0
    """Part of the run over which that share rises from 0 (ALBEF: the first of 30 epochs; BLIP: two of 20)."""

    def __post_init__(self) -> None:
        require_positive(self, "objectives.momentum_contrastive", "queue")
        check_distillation(self)

    @property
    def taught_by(self) -> tuple[str, ...]:
        return ("image", "text", "image_head", "text_head")

    def check(self, config: Any) -> None:
        super().check(config)
        require_whole_turns("objectives.momentum_contrastive.queue", self.queue, config.train.global_batch)

    def build_head(self, model: VisionLanguageModel) -> nn.Module:
        width = model.options.projection_dim
        return nn.ModuleDict({side: FeatureQueue(self.queue, width) for side in ("image", "text")})

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Losses, Report]:
        queues, group = model.heads[self.name], negatives_group(self.negatives)
        with torch.no_grad():
            copied = model.teacher.module
            keys = {"image": copied.image_features(batch), "text": copied.text_features(batch)}
        loss = vk.contrastive_loss(
            model.image_features(batch),
            model.text_features(batch),
            model.scale(),
            image_keys=behind(keys["image"], queues["image"]),
            text_keys=behind(keys["text"], queues["text"]),
            distillation=risen(self.distillation, self.ramp, batch.progress),
            group=group,
            rank_counts=rank_counts(len(batch.labels), group),
            rank_reduction="mean",
            impl=model.impl,
        )
        for side, queue in queues.items():
            queue.push(keys[side])
        return {self.name: loss}, {"logit_scale": model.scale().detach()[0]}

    def measure(self, model: VisionLanguageModel, held_out: HeldOut) -> Figures:
        """Recall both ways among the gallery, beside chance; and the loss over it, of the towers alone, beside that of equal
        similarities."""
        logits = model.scale() * held_out.gallery.similarity
        return {self.name: retrieval(held_out.gallery), f"{self.name}_loss": contrast(logits, logits.T)}


def behind(keys: Tensor, queue: FeatureQueue) -> Tensor:
    """The features of a batch, and behind them those of the queue."""
    return torch.cat((keys, queue.features.to(keys.dtype)))
