"""Copies of a module with one thing wrong, to see that a test notices."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_mutant(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of ``module`` that reads ``new`` for ``old``; Triton wants its source in a file."""
    source = Path(module.__file__).read_text()
    assert old in source, f"{module.__name__} no longer reads {old!r}"
    path = folder / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutant  # dataclasses look their module up
    spec.loader.exec_module(mutant)
    return mutant
