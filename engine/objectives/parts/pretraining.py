"""What DeepSpeed wraps: the model and its objectives in one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.objectives.parts.batch_coupled import BatchCoupledObjective, Features, StepLoss
from engine.objectives.parts.objective import Losses, Objective, Report


class PretrainingModule(nn.Module):
    """`module(batch)` -> (total loss, every named loss, report), of the objectives that the batch is for.

    The model's passes are shared by the objectives. Which modules run depends on `batch.task` alone, never
    on values: ZeRO-3 needs the same order on all ranks.
    """

    def __init__(self, model: VisionLanguageModel, objectives: Mapping[str, Objective]):
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
            features = {name: self.objectives[name].features(self.model, batch) for name in names}
            return features if only_features else self._losses(batch, known, features)

    def batch_coupled(self, batch: Batch) -> list[str]:
        """Names of the batch's objectives whose losses are over all pairs of a step."""
        return [name for name in self._names(batch) if isinstance(self.objectives[name], BatchCoupledObjective)]

    def over_the_step(self, name: str, parts: Sequence[Features]) -> list[StepLoss]:
        """The loss of one of them over the features of all micro-batches, for each of these. It is no part of
        `forward`, so it reads no parameters, which ZeRO-3 holds in there alone."""
        return StepLoss.over(self.objectives[name], parts, self.model.impl)

    def _names(self, batch: Batch) -> list[str]:
        return list(self.objectives if batch.task is None else batch.task)

    def _losses(
        self, batch: Batch, known: Mapping[str, StepLoss], features: Mapping[str, Features]
    ) -> tuple[Tensor, Losses, Report]:
        total, losses, report = 0.0, {}, {}
        for name in self._names(batch):
            objective = self.objectives[name]
            if name in known:
                named, observed, loss = known[name].named, known[name].report, known[name].at(features[name])
            else:
                named, observed = objective(self.model, batch)
                loss = sum(named.values())
            total = total + objective.weight * loss
            losses |= named
            report |= observed
        return total, losses, report
