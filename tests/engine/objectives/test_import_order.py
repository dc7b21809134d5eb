"""How objectives are found: by looking, in any order; what is none is named."""

import subprocess
import sys
from pathlib import Path

import pytest

import engine
import engine.objectives
from engine.objectives import Objective

SCRIPT = """
import importlib, os, pathlib, sys

import jsonargparse, torch, vlkernels  # what every process below would load again

assert "engine" not in sys.modules
failed = []
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
    name = "engine.objectives" if path.stem == "__init__" else f"engine.objectives.{path.stem}"
    process = os.fork()
    if not process:
        importlib.import_module(name)
        os._exit(0 if hasattr(sys.modules["engine.objectives"], "Objectives") else 1)
    if os.waitpid(process, 0)[1]:
        failed.append(name)
print("tried", name)
sys.exit(", ".join(failed) or 0)
"""


def test_a_file_that_is_no_objective_is_named(tmp_path, monkeypatch):
    """A helper that was put beside the objectives, or two of them in one file."""
    (tmp_path / "helper.py").write_text("from engine.objectives.parts.objective import Objective\n")
    monkeypatch.setattr(engine.objectives, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match="helper.py must hold one subclass of Objective, it holds 0$"):
        engine.objectives.find()


def test_an_objective_of_ones_own_need_not_be_measured():
    assert Objective.measure(None, None, None) == {}


def test_any_objective_may_be_imported_first():
    root = Path(engine.__file__).parent
    command = [sys.executable, "-c", SCRIPT, str(root / "objectives")]
    done = subprocess.run(command, cwd=root.parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.startswith("tried engine.objectives."), done.stderr[-2000:]
