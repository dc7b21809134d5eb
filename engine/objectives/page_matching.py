"""Text-image matching of pages: is the picture the words' own (TIM)?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from engine.batch import Sample
from engine.objectives.parts.objective import Draw
from engine.objectives.parts.pages import require_pixels
from engine.objectives.parts.two_way import TwoWayObjective
from engine.sections import require


@dataclass
class PageMatching(TwoWayObjective):
    """Is the picture the page's own (TIM)? Some pages are shown another's, some none.

    Two-way cross-entropy. What masked_language and covered_lines blank is blanked in any of them.
    """

    roles: ClassVar[tuple[str, ...]] = ("joint",)
    what: ClassVar[str] = "pages"

    replaced: float = 0.15
    """Share of pages that are shown the picture of another one, drawn anew every epoch."""
    dropped: float = 0.05
    """Share of pages that are shown the mean colour alone."""

    def __post_init__(self) -> None:
        shares = self.replaced, self.dropped
        require(
            min(shares) >= 0 and 0 < sum(shares) < 1,
            f"objectives.page_matching.replaced and dropped must be shares, together within (0, 1), got {list(shares)}",
        )

    @property
    def replaced_images(self) -> float:
        return self.replaced

    @property
    def dropped_images(self) -> float:
        return self.dropped

    def check(self, config: Any) -> None:
        super().check(config)
        require_pixels(config, "objectives.page_matching")

    def prepare(self, sample: Sample, draw: Draw) -> None:
        require(sample.own_image is not None, "a picture that is always the text's own, page_matching needs pages")
        sample.views[self.name] = int(sample.own_image)
