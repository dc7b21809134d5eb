"""What DeepSpeed wraps: the model and its objectives in one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.objectives.contrastive import ContrastiveObjective
from engine.objectives.masked_language import MaskedLanguageObjective
from engine.objectives.masked_regions import MaskedRegionClassesObjective, MaskedRegionFeaturesObjective
from engine.objectives.matching import MatchingObjective
from engine.objectives.random_matching import RandomMatchingObjective
from engine.sections import Objectives

Losses = dict[str, Tensor]
Report = dict[str, Tensor]
Objective = Callable[[Any, Batch], tuple[Losses, Report]]


def build_objectives(sections: Objectives) -> dict[str, tuple[float, Objective]]:
    """Weight and objective by name, those that a run has."""
    makers: dict[str, Callable[[Any], Objective]] = {
        "contrastive": lambda options: ContrastiveObjective(options.negatives),
        "matching": lambda options: MatchingObjective(options.negatives, options.hardness),
        "masked_language": lambda _: MaskedLanguageObjective(),
        "masked_region_features": lambda _: MaskedRegionFeaturesObjective(),
        "masked_region_classes": lambda options: MaskedRegionClassesObjective(options.targets),
        "random_matching": lambda options: RandomMatchingObjective(options.alignment),
    }
    active = {name: getattr(sections, name) for name in sections.active}
    return {name: (options.weight, makers[name](options)) for name, options in active.items()}


class PretrainingModule(nn.Module):
    """`module(batch)` -> (total loss, every named loss, report), of the objectives that the batch is for.

    The model's passes are shared by the objectives. Which modules run depends on `batch.task` alone, never
    on values: ZeRO-3 needs the same order on all ranks.
    """

    def __init__(self, model: VisionLanguageModel, objectives: Mapping[str, tuple[float, Objective]]):
        super().__init__()
        self.model = model
        self.objectives = dict(objectives)

    def forward(self, batch: Batch) -> tuple[Tensor, Losses, Report]:
        total, losses, report = 0.0, {}, {}
        with self.model.passes_shared():
            for name in self.objectives if batch.task is None else batch.task:
                weight, objective = self.objectives[name]
                named, observed = objective(self.model, batch)
                total = total + weight * sum(named.values())
                losses |= named
                report |= observed
        return total, losses, report
