"""Where these functions were."""

from engine.corruption.image_tokens import choose_regions
from engine.corruption.words import corrupt

__all__ = ["choose_regions", "corrupt"]
