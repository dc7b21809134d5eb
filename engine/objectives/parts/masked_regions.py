"""What the losses over masked regions share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.batch import MaskedRegions, Places, Sample
from engine.corruption.image_tokens import choose_regions
from engine.objectives.parts.objective import Draw, Objective
from engine.sections import require_share


@dataclass
class MaskedRegionObjective(Objective):
    """Some regions of a picture are hidden, one at least."""

    roles: ClassVar[tuple[str, ...]] = ("joint or image",)
    alone: ClassVar[bool] = True

    probability: float = 0.15
    """Share of regions that are masked."""
    shown: float = 0.0
    """Share of masked regions that are seen all the same (ViLBERT: 0.1)."""

    def __post_init__(self) -> None:
        require_share(f"objectives.{self.name}.probability", self.probability)
        require_share(f"objectives.{self.name}.shown", self.shown)

    def prepare(self, sample: Sample, draw: Draw) -> None:
        chosen = choose_regions(len(sample.image), self.probability, draw.random)
        hidden = Places.of_sample(chosen[draw.random.random(len(chosen)) >= self.shown]) if self.shown else None
        sample.views[self.name] = MaskedRegions(Places.of_sample(chosen), hidden=hidden)
