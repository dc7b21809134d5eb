"""What DeepSpeed wraps: the model and its objectives in one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.objectives.batch_coupled import BatchCoupledObjective, Features, Losses, Report, StepLoss
from engine.objectives.contrastive import ContrastiveObjective
from engine.objectives.masked_language import MaskedLanguageObjective
from engine.objectives.masked_regions import MaskedRegionClassesObjective, MaskedRegionFeaturesObjective
from engine.objectives.matching import MatchingObjective
from engine.objectives.random_matching import RandomMatchingObjective
from engine.sections import Objectives

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

    def forward(
        self, batch: Batch, step_losses: Mapping[str, StepLoss] | None = None, *, only_features: bool = False
    ) -> tuple[Tensor, Losses, Report] | dict[str, Features]:
        """`step_losses` were taken over all batches of the step and stand in for the objectives they are named after.
        With `only_features` the result is what such losses need of this batch."""
        known = step_losses or {}
        with self.model.passes_shared():
            # Before all else in both passes over a batch, so that torch's generator draws the same for them.
            names = self.batch_coupled(batch) if only_features else known
            features = {name: self.objectives[name][1].features(self.model, batch) for name in names}
            return features if only_features else self._losses(batch, known, features)

    def batch_coupled(self, batch: Batch) -> list[str]:
        """Names of the batch's objectives whose losses are over all pairs of a step."""
        return [name for name in self._names(batch) if isinstance(self.objectives[name][1], BatchCoupledObjective)]

    def over_the_step(self, name: str, parts: Sequence[Features]) -> list[StepLoss]:
        """The loss of one of them over the features of all micro-batches, for each of these. It is no part of
        `forward`, so it reads no parameters, which ZeRO-3 holds in there alone."""
        return StepLoss.over(self.objectives[name][1], parts, self.model.impl)

    def _names(self, batch: Batch) -> list[str]:
        return list(self.objectives if batch.task is None else batch.task)

    def _losses(
        self, batch: Batch, known: Mapping[str, StepLoss], features: Mapping[str, Features]
    ) -> tuple[Tensor, Losses, Report]:
        total, losses, report = 0.0, {}, {}
        for name in self._names(batch):
            weight, objective = self.objectives[name]
            if name in known:
                named, observed, loss = known[name].named, known[name].report, known[name].at(features[name])
            else:
                named, observed = objective(self.model, batch)
                loss = sum(named.values())
            total = total + weight * loss
            losses |= named
            report |= observed
        return total, losses, report
