"""The runner stores what it measured with its provenance, and times nothing that is wrong."""

import json

import pytest
import torch

from benchmarks import run, uniter_step
from benchmarks.plain_uniter import Sizes, bert
from vlkernels.testing import contract

ARGUMENTS = ["--device", "cpu", "--budget-s", "0"]


def test_results_carry_their_provenance(tmp_path):
    assert run.main([*ARGUMENTS, "--op", "segment_mean", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cpu-*/segment_mean.jsonl")
    row = json.loads(path.read_text().splitlines()[0])
    assert {"op", "benchmark", "dtype", "seconds", "commit", "modified", "torch", "device", "threads", "date"} <= row.keys()
    assert row["seconds"]["vlkernels"]["median"] > 0 and "reference" in row["seconds"]


def test_a_red_contract_prints_no_time(tmp_path, capsys, monkeypatch):
    def red(*_):
        raise AssertionError("wrong by 3")

    monkeypatch.setattr(contract, "verify", red)
    assert run.main([*ARGUMENTS, "--op", "hard_negatives", "--results", str(tmp_path)]) == 1
    assert "contract is red, not timed: wrong by 3" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


TINY_UNITER = Sizes(bert(32, 2, 4), vocab_size=120, feature_values=20, classes=9)


def test_the_uniter_step_compares_equal_work():
    rows, results = uniter_step.run(TINY_UNITER, 2)
    assert [task for task, _ in rows] == ["mrfr", "mrc_kl", "itm", "mlm", "mlm"]
    assert all(value > 0 for _, seconds in rows for value in seconds.values())
    assert results["padded_by_true"]["random"] > 1.4 > 1.1 > results["padded_by_true"]["bucketed"] >= 1
    variants = {"plain random", "packed random", "plain bucketed", "packed bucketed"}
    assert results["true_tokens_per_s"].keys() == variants and len(results["packed_times_as_fast"]) == 8


def test_the_uniter_step_is_not_timed_when_losses_differ(monkeypatch):
    load = uniter_step.load_engine_weights

    def spoiled(plain, engine):
        load(plain, engine)
        torch.nn.init.normal_(engine.transformer.blocks[0].feed_forward.norm.bias, std=0.1)

    monkeypatch.setattr(uniter_step, "load_engine_weights", spoiled)
    monkeypatch.setattr(uniter_step, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="mlm: packed loss"):
        uniter_step.run(TINY_UNITER, 2)
