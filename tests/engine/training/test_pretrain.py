"""The whole road, shrunk: `engine/pretrain.py` on the built-in records."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from launch import ROOT, free_port, run
from shared_cache import shared_cache
from torch._dynamo.utils import counters

from engine.pretrain import main
from engine.training.command_line import parse
from engine.training.telemetry import read_metrics

SCRIPT = ROOT / "engine" / "pretrain.py"
__all__ = ["shared_cache"]
FILES = {
    ".in_use", "checkpoints", "config.json", "config.yaml", "curves.png", "metrics.jsonl", "model.safetensors",
    "retrievals.png", "summary.json", "tensorboard", "tokenizer.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def arguments(output: Path, cache: Path, *more: str) -> list[str]:
    recipe = str(ROOT / "engine" / "recipes" / "quickstart.yaml")
    where = [f"--output={output}", f"--data.cache={cache}", "--device=cpu"]
    return ["--config", recipe, "--tiny=true", *where, "--train.max_steps=4", "--train.save_every=2", *more]


def test_a_run_leaves_its_folder_and_its_result(tmp_path, cache, capsys):
    argv = arguments(tmp_path, cache, "--train.evaluate_every", "2")
    assert main(argv) == 0
    folder = tmp_path / "quickstart"
    assert {path.name for path in folder.iterdir()} == FILES
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("event") == "evaluation"] == [2, 4]
    assert rows[0]["implementations"].keys() >= {"attention", "layer_norm", "contrastive_loss"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 4 and summary["evaluation"]["contrastive"]["chance_recall@1"] > 0
    assert "held-out pairs" in capsys.readouterr().out
    assert parse(["--config", str(folder / "config.yaml")]) == parse(argv)

    assert main(argv) == 0
    assert "steps 4-4 of 12 pairs" in capsys.readouterr().out
    assert json.loads((folder / "summary.json").read_text())["evaluation"] == summary["evaluation"]

    for change, line in (
        (["--train.max_steps", "2"], "is at step 4 already, past the 2 steps asked for"),
        (["--optimizer.weight_decay", "0"], "optimizer.weight_decay was 0.1 and is 0.0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*argv, *change])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and line in err and err.count("\n") == 1, err


def test_faults_of_shards_and_of_held_out_records_are_told(tmp_path, cache, capsys):
    """At the start, where too many of them are one line, and those that evaluation meets later then."""
    shard, damaged = tmp_path / "own.tar", tmp_path / "damaged.tar"
    for path, broken in ((shard, ()), (damaged, (0, 1, 4))):
        with tarfile.open(path, "w") as tar:
            for number in range(6):
                image = io.BytesIO()
                Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(image, "PNG")
                picture = image.getvalue()[: 30 if number in broken else None]
                members = {"png": picture, "txt": b"red number %d" % number, "pkl": b"."}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    argv = arguments(tmp_path, cache, f"--data.source={shard}", f"--data.held_out={damaged}")
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert f"{shard}/0.pkl: a pickle, never opened" in told
    assert f"{damaged}/0: image cannot be decoded" in told
    assert f"held-out data: {damaged}/4: image cannot be decoded" in told
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--data.fault_limit", "7"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "more than data.fault_limit = 7" in err and err.count("\n") == 1, err


def losses_of(folder: Path) -> list[float]:
    """Of the four steps; a step that was taken again counts as it ended."""
    rows = {row["step"]: row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row}
    return [rows[step] for step in (1, 2, 3, 4)]


def test_micro_batches_train_as_one_batch_does(tmp_path, cache):
    """The feature cache on real batches, to the last step and once more from the checkpoint before."""
    options = ["--objectives.matching=null", "--train.log_every=1", "--evaluation.rerank_top=0", "--name"]
    argv = arguments(tmp_path, cache, *options, "cut", "--train.micro_batch=3")
    assert main(arguments(tmp_path, cache, *options, "whole")) == main(argv) == 0
    losses = losses_of(tmp_path / "cut")
    assert losses == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-3)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000004")
    assert main(argv) == 0 and losses_of(tmp_path / "cut") == losses


def test_compiled_blocks_are_compiled_once(tmp_path, cache, capsys):
    """One graph per block and kind of pass, no graph break, and no other after the first compiled step."""
    one_layer = [f"--model.{tower}.layers=1" for tower in ("image", "text", "fusion")]
    argv = arguments(tmp_path, cache, *one_layer, "--train.log_every=1", "--name")
    torch._dynamo.reset()
    counters.clear()
    assert main([*argv, "compiled", "--train.compile=true"]) == 0
    assert 3 <= counters["stats"]["unique_graphs"] <= 8 and not counters["graph_break"]
    assert main([*argv, "eager"]) == 0
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("compiled", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 4


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--train.compile", "true", "--zero.stage", "3"], "train.compile with zero.stage 3"),
        (["--data.source", "nowhere/{00..03}.tar"], "nowhere/00.tar"),
        (["--train.resume", "nowhere"], "train.resume: nowhere holds no checkpoint"),
        (["--tokenizer.path", "nowhere.json"], "tokenizer file nowhere.json does not exist"),
        (["--optimizer.lr_multipliers.tower", "0.5"], "optimizer.lr_multipliers: no parameter"),
        (["--evaluation.zero_shot", "nowhere"], "evaluation.zero_shot must be a folder with at least two"),
        (["--model.fusion.width", "16"], "model.fusion.width must be model.text.width = 128"),
    ],
)
def test_a_mistake_found_later_is_one_line_too(tmp_path, cache, capsys, argv, line):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path, cache, *argv))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and line in err and err.count("\n") == 1, err


def test_two_processes_under_zero_3_in_bf16(tmp_path, cache):
    options = ["--local_rank=0", "--zero.stage", "3", "--precision", "bf16"]
    main_rank, other = run([SCRIPT, *arguments(tmp_path, cache, *options)], world=2)
    assert main_rank.code == 0, main_rank.err
    assert (other.code, other.out) == (0, ""), other.err
    assert {path.name for path in (tmp_path / "quickstart").iterdir()} == FILES


def test_uniter_in_bf16_through_deepspeeds_launcher(tmp_path, shared_cache):
    """The command of the README on two processes, to its exit code."""
    where = [f"--output={tmp_path}", f"--data.cache={shared_cache}", "--device=cpu", "--tiny=true"]
    small = ["--data.max_records=64", "--evaluation.gallery=16", "--train.max_steps=4", "--seed=29"]
    recipe = str(ROOT / "engine" / "recipes" / "uniter_base.yaml")
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    (finished,) = run([*launcher, SCRIPT, "--config", recipe, *where, *small], timeout=150)
    assert finished.code == 0, finished.err
    assert {path.name for path in (tmp_path / "uniter_base").iterdir()} == FILES - {"retrievals.png"}
    summary = json.loads((tmp_path / "uniter_base" / "summary.json").read_text())
    rows = [row for row in read_metrics(tmp_path / "uniter_base" / "metrics.jsonl") if "steps" in row]
    assert summary["step"] == 4 and summary["samples_seen"] == rows[-1]["samples_seen"] > 4 * 12
    assert sum(row["steps"]["loss"] for row in rows) == 4


def test_two_processes_share_one_line_about_a_mistake(tmp_path, cache):
    command = [SCRIPT, *arguments(tmp_path, cache, "--data.source", "nowhere/0.tar")]
    main_rank, other = run(command, world=2)
    assert (main_rank.code, other.code) == (2, 2)
    assert main_rank.err.count("\n") == 1 and "nowhere/0.tar" in main_rank.err
    assert other.err == ""
