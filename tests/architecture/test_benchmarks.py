"""The runner stores what it measured with its provenance, and times nothing that is wrong."""

import json

from benchmarks import run
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
