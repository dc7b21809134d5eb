"""Targets that a momentum copy of the model has a share in."""

from __future__ import annotations

from typing import Any

from engine.sections import require, require_share


def risen(share: float, ramp: float, progress: float) -> float:
    """What a share is after this part of a run, which rises to it over the first part `ramp`."""
    return share * min(1.0, progress / ramp) if ramp else share


def check_distillation(objective: Any) -> None:
    """Refuse shares that are none."""
    require_share(f"objectives.{objective.name}.distillation", objective.distillation)
    ramp = objective.ramp
    require(0 <= ramp <= 1, f"objectives.{objective.name}.ramp must be in [0, 1], got {ramp}")
