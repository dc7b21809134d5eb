"""Objectives: every file of this folder is one, found by looking; what they share is in `parts`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass

from engine.objectives.parts.batch_coupled import BatchCoupledObjective, Features, StepLoss
from engine.objectives.parts.objective import Objective, add_heads
from engine.objectives.parts.pretraining import PretrainingModule

__all__ = [
    "BatchCoupledObjective",
    "Features",
    "Objective",
    "Objectives",
    "PretrainingModule",
    "StepLoss",
    "add_heads",
]


def find() -> dict[str, type[Objective]]:
    """The objective of every file, by the file's name."""
    return {name: _defined_in(name) for _, name, is_folder in pkgutil.iter_modules(__path__) if not is_folder}


def _defined_in(name: str) -> type[Objective]:
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    found = [one for one in classes if issubclass(one, Objective)]
    if len(found) != 1:
        raise ImportError(f"{module.__file__} must hold one subclass of Objective, it holds {len(found)}")
    return found[0]


@dataclass
class _Chosen:
    """What all objectives of a run are asked for together."""

    @property
    def active(self) -> dict[str, Objective]:
        """The objectives the run has, by name."""
        return {name: objective for name, objective in vars(self).items() if objective is not None}


def _section(found: dict[str, type[Objective]]) -> type:
    """`objectives` of a recipe: a field for each, null unless it is given, explained by its first line."""
    lines = [f"    {name}: {objective.__doc__.partition(chr(10))[0]}" for name, objective in found.items()]
    fields = [(name, objective | None, None) for name, objective in found.items()]
    explained = {"__doc__": "\n".join(["The losses; null leaves one out.", "", "Args:", *lines]), "__module__": __name__}
    return dataclasses.make_dataclass("Objectives", fields, bases=(_Chosen,), namespace=explained)


Objectives = _section(find())
