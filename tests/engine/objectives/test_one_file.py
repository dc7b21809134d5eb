"""Adding an objective touches one new file and one recipe line, adding a system one recipe: the examples of the docs run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from shared_cache import shared_cache

import engine
from engine.pretrain import main
from engine.recipes import table
from engine.training.telemetry import read_metrics

__all__ = ["shared_cache"]

ROOT = Path(engine.__file__).parents[1]
RECIPE = """
name: toy
data: {source: builtin, held_out: builtin}
objectives:
  pull: {margin: 0.1}
train: {max_steps: 2}
"""


def example(language: str) -> str:
    """The block of docs/ARCHITECTURE.md in this language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs/ARCHITECTURE.md").read_text(), re.S | re.M)
    return block


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "engine.pretrain", f"--config={tmp_path / 'toy.yaml'}", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)


def test_an_objective_is_one_file_and_one_line_of_a_recipe(tmp_path, shared_cache):
    shutil.copytree(Path(engine.__file__).parent, tmp_path / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "engine/objectives/pull.py").write_text(example("python"))
    (tmp_path / "toy.yaml").write_text(RECIPE)
    assert "--objectives.pull.margin\n        What is left of it. (default: 0.5)" in run(tmp_path, "--help").stdout
    where = ["--device=cpu", f"--data.cache={shared_cache}"]
    trained = run(tmp_path, *where, "--tiny=true", "--train.max_steps=2", "--zero.stage=0")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert "pull: loss" in trained.stdout
    weights = (tmp_path / "runs/toy/model.safetensors").read_bytes()
    assert b"heads.pull.weight" in weights and b"heads.matching" not in weights


def test_a_system_is_one_recipe(tmp_path, shared_cache, monkeypatch):
    (tmp_path / "captioner.yaml").write_text(example("yaml"))
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    block = table.describe("captioner")
    assert "decoder       words, 2 x 128, 4 heads, pre-norm, reads image\n                ◣" in block
    assert "objectives    contrastive, causal_language" in block or "objectives    causal_language, contrastive" in block
    where = [f"--output={tmp_path}", f"--data.cache={shared_cache}", "--device=cpu", "--precision=fp32"]
    main([f"--config={tmp_path / 'captioner.yaml'}", "--tiny=true", "--train.max_steps=3", "--train.log_every=1", *where])
    names = {name for row in read_metrics(tmp_path / "captioner/metrics.jsonl") for name in row}
    assert {"contrastive", "causal_language"} <= names and (tmp_path / "captioner/model.safetensors").is_file()
