"""The losses of a run, and their options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.sections.checks import require, require_not_negative, require_share


@dataclass
class Contrastive:
    """Image-text contrastive loss (ITC)."""

    weight: float = 1.0
    """Factor in the total loss."""
    negatives: Literal["global", "local"] = "global"
    """global: against all pairs of the step; local: against those of this rank."""


@dataclass
class Matching:
    """Image-text matching with hard negatives (ITM)."""

    weight: float = 1.0
    """Factor in the total loss."""
    negatives: Literal["global", "local"] = "global"
    """Where hard negatives are drawn from. global: the pairs of all ranks, which takes one micro-batch per rank and
    step; local: this rank's own micro-batch."""
    hardness: float = 1.0
    """Factor on the contrastive scores that negatives are drawn by. 1: as often as the contrastive softmax confuses
    them, so the loss has nothing to learn until fusion knows more than the towers; 0: all alike."""

    def __post_init__(self) -> None:
        require_not_negative(self, "objectives.matching", "hardness")


@dataclass
class MaskedLanguage:
    """Masked-language modelling of the caption beside its image (MLM)."""

    weight: float = 1.0
    """Factor in the total loss."""
    probability: float = 0.15
    """Share of tokens that are predicted."""
    whole_word: bool = False
    """Select whole words instead of single tokens."""
    when_none: Literal["any", "first"] = "any"
    """Where the draw selects nothing. any: one is drawn, with the fate of all; first: the first token is masked, as
    UNITER does."""

    def __post_init__(self) -> None:
        require_share("objectives.masked_language.probability", self.probability)


@dataclass
class MaskedRegionFeatures:
    """Regression of the features of masked regions (MRFR)."""

    weight: float = 1.0
    """Factor in the total loss, a mean over all elements."""
    probability: float = 0.15
    """Share of regions that are masked."""

    def __post_init__(self) -> None:
        require_share("objectives.masked_region_features.probability", self.probability)


@dataclass
class MaskedRegionClasses:
    """The detector's classes of masked regions (MRC)."""

    weight: float = 1.0
    """Factor in the total loss; with soft targets a mean over all elements."""
    probability: float = 0.15
    """Share of regions that are masked."""
    targets: Literal["soft", "hard"] = "soft"
    """soft: KL divergence from the detector's distribution (MRC-kl); hard: cross-entropy of its best class that is not
    the background."""

    def __post_init__(self) -> None:
        require_share("objectives.masked_region_classes.probability", self.probability)


@dataclass
class RandomMatching:
    """Image-text matching with images replaced at random before batching (ITM), and word-region alignment (WRA)."""

    weight: float = 1.0
    """Factor in the total loss."""
    probability: float = 0.5
    """Share of pairs whose image is replaced by another one, drawn anew every epoch."""
    alignment: float = 0.1
    """Factor of the alignment loss: optimal-transport distance of own pairs less that of replaced ones (0: none)."""

    def __post_init__(self) -> None:
        require_share("objectives.random_matching.probability", self.probability)
        require_not_negative(self, "objectives.random_matching", "alignment")


@dataclass
class Objectives:
    """The losses; null leaves one out."""

    contrastive: Contrastive | None = field(default_factory=Contrastive)
    """Image-text contrastive loss (ITC)."""
    matching: Matching | None = field(default_factory=Matching)
    """Image-text matching with hard negatives (ITM)."""
    masked_language: MaskedLanguage | None = field(default_factory=MaskedLanguage)
    """Masked-language modelling of the caption beside its image (MLM)."""
    masked_region_features: MaskedRegionFeatures | None = None
    """Regression of the features of masked regions (MRFR)."""
    masked_region_classes: MaskedRegionClasses | None = None
    """The detector's classes of masked regions (MRC)."""
    random_matching: RandomMatching | None = None
    """Image-text matching with images replaced at random (ITM), and word-region alignment (WRA)."""

    def __post_init__(self) -> None:
        require(bool(self.active), "objectives: at least one must be given")

    @property
    def active(self) -> list[str]:
        """Names of the objectives the run has."""
        return [name for name, options in vars(self).items() if options is not None]

    @property
    def need_towers(self) -> list[str]:
        """Names of the active objectives that compare features of two towers."""
        return [name for name in self.active if name in ("contrastive", "matching")]

    @property
    def need_joint(self) -> list[str]:
        """Names of the active objectives over one joint stream of text and regions; each has batches of its own."""
        return [name for name in self.active if name.startswith("masked_region") or name == "random_matching"]

    @property
    def batch_coupled(self) -> list[str]:
        """Names of the active objectives whose value depends on which pairs share a batch."""
        return [name for name in self.active if name in ("contrastive", "matching")]
