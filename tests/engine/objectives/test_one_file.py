"""Adding an objective touches one new file and one recipe line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from shared_cache import shared_cache

import engine

__all__ = ["shared_cache"]

TOY = '''
"""Pull the features of partners together."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from engine.objectives.parts.normalization import normalizer
from engine.objectives.parts.objective import Objective


@dataclass
class Pull(Objective):
    """Squared distance of partners behind a map of the images."""

    roles: ClassVar[tuple[str, ...]] = ("image", "text")

    margin: float = 0.5
    """What is left of it."""

    def prepare(self, sample, draw):
        sample.views[self.name] = self.margin * draw.random.random()

    def build_head(self, model):
        return nn.Linear(model.options.projection_dim, model.options.projection_dim)

    def __call__(self, model, batch):
        images = model.heads[self.name](model.image_features(batch))
        distance = (images - model.text_features(batch)).square().sum(1) - batch.views[self.name]
        return {self.name: distance.relu().sum() * normalizer(batch, "pairs")}, {}

    def measure(self, model, held_out):
        totals = [self(model, batch)[0][self.name].item() for batch in held_out.batches(self.name)]
        return {self.name: {"loss": sum(totals) / held_out.most, "loss_nothing": 0.0}}
'''
RECIPE = """
name: toy
data: {source: builtin, held_out: builtin}
objectives:
  pull: {margin: 0.1}
train: {max_steps: 2}
"""


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(engine.__file__).parents[1]}"}
    command = [sys.executable, "-m", "engine.pretrain", f"--config={tmp_path / 'toy.yaml'}", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)


def test_an_objective_is_one_file_and_one_line_of_a_recipe(tmp_path, shared_cache):
    shutil.copytree(Path(engine.__file__).parent, tmp_path / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "engine/objectives/pull.py").write_text(TOY)
    (tmp_path / "toy.yaml").write_text(RECIPE)
    assert "--objectives.pull.margin\n        What is left of it. (default: 0.5)" in run(tmp_path, "--help").stdout
    where = ["--device=cpu", f"--data.cache={shared_cache}"]
    trained = run(tmp_path, *where, "--tiny=true", "--train.max_steps=2", "--zero.stage=0")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert "pull: loss" in trained.stdout
    weights = (tmp_path / "runs/toy/model.safetensors").read_bytes()
    assert b"heads.pull.weight" in weights and b"heads.matching" not in weights
