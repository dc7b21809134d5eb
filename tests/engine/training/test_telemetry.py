"""The run folder."""

import json

import pytest
import torch
from standin import small_config, stream
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_worker import run as train

from engine.training.checkpoint import Progress
from engine.training.command_line import parse
from engine.training.step import Agreement, Meter, StepResult, agree
from engine.training.telemetry import Telemetry, flat_numbers, read_metrics
from engine.training.zero import Ranks

MAIN = Ranks(0, 1, torch.device("cpu"))


def test_a_line_per_logged_step(tmp_path):
    train(output=str(tmp_path), max_steps=5, log_every=2)
    started, *rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert started["event"] == "start" and started["torch"] == torch.__version__ and started["processes"] == 1
    assert isinstance(started["implementations"], dict)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert set(rows[0]) == {
        "step", "samples_seen", "loss", "pairs", "tokens", "hidden_norm", "lr", "grad_norm", "samples_per_s",
        "tokens_per_s", "skipped", "faults", "peak_gib",
    }  # fmt: skip
    assert [row["samples_seen"] for row in rows] == [16, 32, 40]
    assert rows[0]["loss"] == pytest.approx(rows[0]["pairs"] + rows[0]["tokens"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 5]


def test_the_configuration_of_a_run_parses_back(tmp_path):
    train(output=str(tmp_path), max_steps=1)
    written = parse(["--config", str(tmp_path / "run" / "config.yaml")])
    assert written.train.max_steps == 1 and written.output == str(tmp_path)


def test_faults_are_counted_and_named(tmp_path, capsys):
    train(output=str(tmp_path), faulty_at=2)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (fault,) = (row for row in rows if row.get("event") == "broken record")
    assert fault["lines"] == ["record 0: not a picture"]
    assert rows[-1]["faults"] == 1
    assert "step 3: broken record: record 0: not a picture" in capsys.readouterr().out


def test_broken_data_saves_and_stops_with_its_line(tmp_path):
    code, result = train(output=str(tmp_path), broken_at=2)
    assert code == 1 and result == {"step": 2, "stopped": "shard 7 ends early"}
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002"


def test_a_diverged_run_stops_with_a_clear_line(tmp_path):
    code, result = train(output=str(tmp_path), poison_from=2, max_steps=60, log_every=5)
    assert code == 1 and result["step"] == 22
    assert result["stopped"].startswith("the gradient was not finite in 20 steps in a row, up to step 22")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in JSON")) for line in lines]
    assert sum(row.get("event") == "skipped step" for row in rows) == 20
    assert [row["skipped"] for row in rows if "loss" in row or "skipped" in row][-1] == 18


def test_a_single_bad_step_is_skipped_and_counted(tmp_path):
    code, result = train(output=str(tmp_path), poison_from=3, max_steps=4)
    assert code == 0 and result["skipped"] == 1


def test_steps_that_will_be_taken_again_are_forgotten(tmp_path):
    config = small_config(output=str(tmp_path))
    telemetry = Telemetry(config, MAIN, step=0)
    for step in (1, 2, 3):
        telemetry.log(step, {"loss": 1.0 / step, "samples_per_s": 1.0})
    telemetry.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "lo')  # cut off by a kill
    Telemetry(config, MAIN, step=2).close()
    assert [row["step"] for row in read_metrics(metrics)] == [1, 2]


def test_the_summary_and_the_curves(tmp_path):
    config = small_config(output=str(tmp_path))
    telemetry = Telemetry(config, MAIN, step=0)
    telemetry.log(1, {"loss": 2.0, "masked_language": float("nan"), "samples_per_s": 3.0})
    results = {"pairs": 9, "contrastive": {"recall@1": 0.5, "chance_recall@1": 0.1}}
    telemetry.finished(Progress(step=1, samples_seen=8, seconds=2.0), results)
    telemetry.close()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["evaluation"] == results and summary["samples_per_s"] == 4.0 and summary["step"] == 1
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    flat = {"pairs": 9, "contrastive/recall@1": 0.5, "contrastive/chance_recall@1": 0.1}
    assert flat_numbers(results) == flat


def test_other_ranks_write_nothing(tmp_path):
    telemetry = Telemetry(small_config(output=str(tmp_path)), Ranks(1, 2, torch.device("cpu")), step=0)
    telemetry.log(1, {})
    telemetry.warn(1, "broken record", ["x"])
    telemetry.finished(Progress(), {})
    telemetry.close()
    assert list(tmp_path.iterdir()) == []


def test_every_value_is_the_mean_over_the_steps_that_had_it():
    """Steps of different tasks between two lines; a task with none, or skipped ones only, is absent."""
    meter = Meter()
    everyone = Agreement(stop=False, failed=False, num_faults=0, tokens=100, counts={"pairs": 7, "words": 9})
    for name, number in (("words", 3.0), ("regions", 8.0), ("words", 5.0), ("skipped", 1.0)):
        values = {"loss": torch.tensor(number), name: torch.tensor(number)}
        meter.add(StepResult(name != "skipped", values), everyone, seconds=0.5)
    assert meter.means(MAIN) == pytest.approx({"loss": 16 / 3, "words": 4.0, "regions": 8.0})
    assert meter.steps == {"loss": 3, "words": 2, "regions": 1}
    assert meter.speeds() == {"samples_per_s": 28 / 2, "tokens_per_s": 400 / 2}


def test_counts_of_a_window_are_those_of_all_its_micro_batches():
    config = small_config(accumulation=4)
    window = next(stream(config))
    agreement = agree(window, MAIN, stop=True)
    assert agreement.counts == {"pairs": 8, "tokens": 3} and agreement.tokens == 8
    assert agreement.stop and not agreement.failed
    assert agree([], MAIN, stop=False).failed
