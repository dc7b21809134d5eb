"""Tables of relative bias belong to a stack and are read by its blocks: under ZeRO-3 they are whole there too."""

import pytest
import torch
from launch import ROOT, run
from safetensors.torch import load_file

from engine.build import build_model
from engine.recipes import table
from engine.training.telemetry import read_metrics

# bpe: the quickest to train
OPTIONS = ["--tiny=true", "--device=cpu", "--precision=fp32", "--tokenizer.kind=bpe", "--optimizer.kind=sgd",
           "--optimizer.lr=0.3", "--schedule.kind=constant", "--train.max_steps=4", "--train.log_every=1",
           "--train.save_every=0", "--model.text.dropout=0", "--model.text.attention_dropout=0", "--model.decoder.dropout=0",
           "--model.decoder.attention_dropout=0"]  # fmt: skip


def trained(tmp_path, world: int, stage: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and the weights that are left."""
    name = f"ranks_{world}"
    recipe, script = (str(ROOT / "engine" / part) for part in ("recipes/t5_base.yaml", "pretrain.py"))
    where = [f"--output={tmp_path}", f"--name={name}", f"--data.cache={tmp_path / 'cache'}", f"--zero.stage={stage}"]
    for finished in run([script, "--config", recipe, *OPTIONS, *where], world=world, timeout=120):
        assert finished.code == 0, finished.err
    rows = read_metrics(tmp_path / name / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row], load_file(tmp_path / name / "model.safetensors")


def test_t5_on_two_ranks_under_zero_3_is_t5_on_one(tmp_path):
    (alone, weights), (together, others) = trained(tmp_path, 1, 1), trained(tmp_path, 2, 3)
    assert len(alone) == 4 and together == pytest.approx(alone, rel=1e-5)
    begun = initial_weights(len(weights["text.embedder.words"]))
    tables = [name for name in begun if "distances" in name]
    assert len(tables) == 2
    for name in tables:
        moved = (weights[name] - begun[name]).abs().max()
        assert moved > 1e-4 and (weights[name] - others[name]).abs().max() < 1e-2 * moved, name


def initial_weights(vocab_size: int) -> dict[str, torch.Tensor]:
    """What the runs began with."""
    config = table.recipe("t5_base", *OPTIONS)
    torch.manual_seed(config.seed)
    return dict(build_model(config, vocab_size).named_parameters())
