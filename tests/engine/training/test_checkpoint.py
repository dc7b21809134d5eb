"""Resume is exact; a damaged or unfinished checkpoint costs only itself."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from launch import finish, run, start
from random_pairs import UNITER
from trainer_worker import run as train

from engine.objectives import Objectives
from engine.objectives.masked_language import MaskedLanguage
from engine.sections import Buckets, Data, DataSet, JointStack, Model, Regions
from engine.training.checkpoint import describe_file, write_whole
from engine.training.telemetry import read_metrics

WORKER = Path(__file__).with_name("trainer_worker.py")
DAMAGES = ("truncated shard", "flipped bit", "missing shard", "no manifest", "cut manifest")
ONE_STREAM = Model(image=None, text=None, fusion=None, joint=JointStack(**UNITER))
MASKED = Objectives(masked_language=MaskedLanguage())


def one_set(words: float) -> Data:
    return sets_named("all", words=words)


def sets_named(*names: str, words: float = 1.0) -> Data:
    one = DataSet("builtin-scenes", {"masked_language": words})
    return Data(regions=Regions(), sets={name: one for name in names})


def losses(output: Path, name: str = "run") -> dict[int, float]:
    rows = read_metrics(output / name / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "event" not in row}


def folders(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "run" / "checkpoints").glob("step_*"))


def keep_first_half(output: Path) -> None:
    """As if the run had ended at its first checkpoint."""
    shutil.rmtree(output / "run" / "checkpoints" / "step_00000006")


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_resume_is_exact_bit_for_bit(tmp_path, stage, precision):
    options = {"stage": stage, "precision": precision, "output": str(tmp_path)}
    options |= {"max_steps": 6, "save_every": 3}
    code, straight = train(**options)
    curve = losses(tmp_path)
    assert code == 0 and sorted(curve) == [1, 2, 3, 4, 5, 6]
    assert folders(tmp_path) == ["step_00000003", "step_00000006"]

    keep_first_half(tmp_path)
    torch.manual_seed(99)
    code, resumed = train(**options)
    assert code == 0 and resumed == straight
    assert losses(tmp_path) == curve


def test_random_states_are_restored(tmp_path):
    train(output=str(tmp_path), max_steps=2)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(output=str(tmp_path), max_steps=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    options = {"output": str(tmp_path), "max_steps": 4, "save_every": 2}
    _, straight = train(**options)
    newest = tmp_path / "run" / "checkpoints" / "step_00000004"
    shard = next(newest.glob("*optim_states.pt"))
    manifest = newest / "manifest.json"
    if damage == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "flipped bit":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "missing shard":
        shard.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        write_whole(manifest, manifest.read_text()[:50])
    code, resumed = train(**options)
    assert code == 0 and resumed == straight
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("event") == "start"] == [1, 3]


def test_the_newest_are_kept_and_named(tmp_path):
    train(output=str(tmp_path), max_steps=7, save_every=2, keep_checkpoints=3)
    assert folders(tmp_path) == ["step_00000004", "step_00000006", "step_00000007"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000007"
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_00000007" / "manifest.json").read_text())
    assert manifest["progress"]["step"] == 7 and manifest["progress"]["samples_seen"] == 56


def test_a_finished_run_is_not_taken_again(tmp_path):
    _, first = train(output=str(tmp_path), max_steps=2)
    _, second = train(output=str(tmp_path), max_steps=2)
    assert first == second and sorted(losses(tmp_path)) == [1, 2]


def test_resume_never_starts_again_and_loses_nothing(tmp_path):
    _, first = train(output=str(tmp_path), max_steps=2)
    _, second = train(output=str(tmp_path), max_steps=2, resume="never")
    assert first == second
    assert losses(tmp_path, "run.1") == losses(tmp_path)


def test_resume_from_another_run(tmp_path):
    train(output=str(tmp_path), name="first", max_steps=2)
    _, resumed = train(output=str(tmp_path), name="second", max_steps=4, resume=str(tmp_path / "first"))
    _, straight = train(output=str(tmp_path), name="third", max_steps=4, save_every=2)
    assert resumed == straight and sorted(losses(tmp_path, "second")) == [3, 4]
    with pytest.raises(ValueError, match="nowhere holds no checkpoint"):
        train(output=str(tmp_path), name="fourth", resume=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "line"),
    [({"stage": 2}, "zero.stage was 1 and is 2"), ({"precision": "bf16"}, "precision was fp32 and is bf16")],
)
def test_a_checkpoint_of_another_kind_is_one_clear_line(tmp_path, change, line):
    train(output=str(tmp_path), max_steps=1)
    way_out = "give the run another --name, or begin it anew with --train.resume never"
    with pytest.raises(ValueError, match=f"cannot resume from .*step_00000001: {line}; {way_out}$"):
        train(output=str(tmp_path), max_steps=2, **change)


def test_a_checkpoint_of_another_plan_is_one_clear_line(tmp_path):
    """Where steps draw their task and bucketed batches, other ratios or budgets give a step other batches."""
    base = {"output": str(tmp_path), "max_steps": 1, "model": ONE_STREAM, "objectives": MASKED}
    base |= {"data": one_set(words=1.0), "buckets": Buckets(64)}
    train(**base)
    shallower = Model(image=None, text=None, fusion=None, joint=JointStack(layers=3, **UNITER))
    for change, line in (
        ({"buckets": Buckets(128)}, r"train.buckets was {'tokens': 64, .*} and is {'tokens': 128"),
        ({"data": one_set(words=2.0)}, r"data.sets was {'all': {'masked_language': 1.0}} and is {'all'.* 2"),
        ({"global_batch": 16}, "train.global_batch was 8 and is 16"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"model": shallower}, "model.joint.layers was 4 and is 3"),
    ):
        with pytest.raises(ValueError, match=f"cannot resume from .*step_00000001: {line}"):
            train(**{**base, **change})


def test_a_checkpoint_from_before_there_were_copies_is_one_clear_line(tmp_path):
    """Its files are whole; what they hold is less."""
    train(output=str(tmp_path), max_steps=1)
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    state = torch.load(newest / "rank_0.pt")
    del state["averages"]
    torch.save(state, newest / "rank_0.pt")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["rank_0.pt"] = describe_file(newest / "rank_0.pt")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="cannot resume from .*step_00000001: it was written before checkpoints had momentum"):
        train(output=str(tmp_path), max_steps=2)


def test_sets_in_another_order_are_another_plan(tmp_path):
    """Their streams are numbered, so another order draws other examples."""
    base = {"output": str(tmp_path), "max_steps": 1, "model": ONE_STREAM, "objectives": MASKED, "buckets": Buckets(64)}
    train(**base, data=sets_named("one", "other"))
    with pytest.raises(ValueError, match=r"the order of tasks was \['one masked_language', 'other .* is \['other"):
        train(**base, data=sets_named("other", "one"))


def test_a_kill_at_any_moment_loses_nothing_saved(tmp_path, monkeypatch):
    """Die after every single file operation of a save; the checkpoint before it always loads."""
    options = {"output": str(tmp_path), "max_steps": 4, "save_every": 2}
    _, straight = train(**options)
    complete = tmp_path / "complete"
    shutil.copytree(tmp_path / "run", complete)

    class Killed(BaseException):
        pass

    for moment in ("rmtree", "shards", "random states", "manifest", "latest"):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(complete, tmp_path / "run")
        keep = tmp_path / "run" / "checkpoints"
        shutil.rmtree(keep / "step_00000004")
        with monkeypatch.context() as patch:
            die_at(patch, moment, Killed)
            with pytest.raises(Killed):
                train(**options)
        _, resumed = train(**options)
        assert resumed == straight, moment


def die_at(patch, moment: str, death: type[BaseException]) -> None:
    """Let the process end right after one stage of a save."""
    from engine.training import checkpoint
    from engine.training.zero import Engine

    def then_die(function, name: str = ""):
        def dying(*arguments, **options):
            function(*arguments, **options)
            if not name or any(isinstance(item, Path) and item.name == name for item in arguments):
                raise death

        return dying

    if moment == "rmtree":
        patch.setattr(checkpoint.shutil, "rmtree", then_die(shutil.rmtree))
    elif moment == "shards":
        patch.setattr(Engine, "save", then_die(Engine.save))
    elif moment == "random states":
        patch.setattr(checkpoint.torch, "save", then_die(torch.save, "rank_0.pt"))
    else:
        name = {"manifest": "manifest.json", "latest": "latest"}[moment]
        patch.setattr(checkpoint, "write_whole", then_die(write_whole, name))


def test_two_ranks_resume_exactly_after_kill_9(tmp_path):
    """Stage 2, two processes, one of them killed: what the survivors saved is taken up where it was."""
    options = {"stage": 2, "output": str(tmp_path), "max_steps": 5, "save_every": 2}
    both = [json.dumps({**options, "name": "straight"}), json.dumps({**options, "kill_at": 3})]
    killed = run([WORKER, *both], 2)
    assert [finished.code for finished in killed] == [-signal.SIGKILL] * 2
    straight = [json.loads(re.search(r"^{.*}$", finished.out, re.MULTILINE)[0]) for finished in killed]
    resumed = [r.result() for r in run([WORKER, json.dumps(options)], 2)]
    assert resumed == straight
    assert losses(tmp_path) == losses(tmp_path, "straight")
    with pytest.raises(ValueError, match="the number of processes was 2 and is 1"):
        train(**options)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_a_signal_saves_and_leaves(tmp_path, sent, code):
    options = {"output": str(tmp_path), "max_steps": 40, "pause": 0.05}
    (process,) = processes = start([WORKER, json.dumps(options)])
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.02)
    process.send_signal(sent)
    (finished,) = finish(processes, timeout=30)
    assert finished.code == code, finished.err
    step = json.loads(finished.out.splitlines()[-1])["step"]
    assert 2 < step < 40
    assert folders(tmp_path) == [f"step_{step:08d}"]


