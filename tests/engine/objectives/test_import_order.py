"""Whichever objective is imported first, the package is whole: none needs another to have been imported before it."""

import subprocess
import sys
from pathlib import Path

import engine

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


def test_any_objective_may_be_imported_first():
    root = Path(engine.__file__).parent
    command = [sys.executable, "-c", SCRIPT, str(root / "objectives")]
    done = subprocess.run(command, cwd=root.parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.startswith("tried engine.objectives."), done.stderr[-2000:]
