"""What a recipe reproduces: shown by `python -m engine.recipes`, of no effect on a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.sections.checks import require, require_positive

ROUNDING = 0.05
"""How far a paper's rounded figure may be off, as a share of it."""


@dataclass
class System:
    """A published system."""

    paper: str = ""
    """Authors and year."""
    recalled: list[str] | None = None
    """Settings, or whole sections of them, that are from memory: neither read in the paper nor in the release (null: nobody
    has compared the recipe with them)."""
    counted: str = "the paper"
    """Whose parameters are counted: a class of `transformers`, the release or the paper."""
    parameters: int | None = None
    """Parameters of the published model, each tied tensor once (null: no figure is known)."""
    precision: Literal["exact", "rounded"] = "exact"
    """exact: a count of tensors, which the recipe's must equal but for `difference`; rounded: a figure of the paper."""
    difference: dict[str, int] = field(default_factory=dict)
    """What the recipe's model has more of (or less, below 0) than the published one, and how many parameters it is."""

    def __post_init__(self) -> None:
        require_positive(self, "system", "parameters")
        require(
            not self.difference or (self.precision == "exact" and self.parameters is not None),
            "system.difference explains an exact count: give system.parameters, and no system.precision rounded",
        )

    @property
    def status(self) -> str:
        """What the settings rest on."""
        if self.recalled is None:
            return "settings not compared with the paper"
        return f"settings as published, from memory {', '.join(self.recalled)}" if self.recalled else "settings as published"

    def agrees(self, parameters: int) -> bool:
        """Whether a model of so many parameters is the published one, as far as a count can tell."""
        if self.parameters is None:
            return True
        if self.precision == "exact":
            return parameters == self.parameters + sum(self.difference.values())
        return abs(parameters - self.parameters) <= ROUNDING * self.parameters
