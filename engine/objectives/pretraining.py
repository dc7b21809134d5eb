"""What DeepSpeed wraps: the model and its objectives in one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.objectives.contrastive import ContrastiveObjective
from engine.objectives.masked_language import MaskedLanguageObjective
from engine.objectives.matching import MatchingObjective
from engine.sections import Objectives

Losses = dict[str, Tensor]
Report = dict[str, Tensor]
Objective = Callable[[VisionLanguageModel, Batch], tuple[Losses, Report]]


def build_objectives(sections: Objectives) -> dict[str, tuple[float, Objective]]:
    """Weight and objective by name, those that a run has."""
    built: dict[str, tuple[float, Objective]] = {}
    if sections.contrastive is not None:
        built["contrastive"] = (
            sections.contrastive.weight,
            ContrastiveObjective(sections.contrastive.negatives),
        )
    if sections.matching is not None:
        matching = sections.matching
        built["matching"] = matching.weight, MatchingObjective(matching.negatives, matching.hardness)
    if sections.masked_language is not None:
        built["masked_language"] = sections.masked_language.weight, MaskedLanguageObjective()
    return built


class PretrainingModule(nn.Module):
    """`module(batch)` -> (total loss, every named loss, report); the model's passes are shared by the
    objectives."""

    def __init__(self, model: VisionLanguageModel, objectives: Mapping[str, tuple[float, Objective]]):
        super().__init__()
        self.model = model
        self.objectives = dict(objectives)

    def forward(self, batch: Batch) -> tuple[Tensor, Losses, Report]:
        total, losses, report = 0.0, {}, {}
        with self.model.passes_shared():
            for weight, objective in self.objectives.values():
                named, observed = objective(self.model, batch)
                total = total + weight * sum(named.values())
                losses |= named
                report |= observed
        return total, losses, report
