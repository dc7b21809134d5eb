"""Two-way classification of texts of two segments: are they as in their document?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from engine.batch import Sample
from engine.objectives.parts.objective import Draw
from engine.objectives.parts.two_way import TwoWayObjective
from engine.sections import require


@dataclass
class SentencePairObjective(TwoWayObjective):
    """The data decide which pairs there are; the label is 0 where they are as in their document."""

    roles: ClassVar[tuple[str, ...]] = ("joint or text",)
    what: ClassVar[str] = "pairs of segments"

    def check(self, config: Any) -> None:
        super().check(config)
        found = config.data.documents
        require(found == self.name, f"objectives.{self.name} needs data.documents {self.name}, got {found}")

    def prepare(self, sample: Sample, draw: Draw) -> None:
        require(sample.pair is not None, f"a text of one segment, {self.name} needs two")
        sample.views[self.name] = sample.pair
