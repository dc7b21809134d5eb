"""`python -m vlkernels` says what runs here and why."""

import pytest

from vlkernels import __main__ as command
from vlkernels import ops


def test_the_report_names_every_op_and_its_choice(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    for spec in ops.specs():
        assert f"{spec.name:<22} auto -> " in printed


def test_the_report_gives_the_reason_for_what_is_skipped(capsys, monkeypatch):
    monkeypatch.setattr("vlkernels.core.native._missing", lambda op, key: "not built today")
    command.main([])
    assert "cpp: not built today" in capsys.readouterr().out


def test_check_proves_an_op_and_counts_failures(capsys, monkeypatch):
    assert command.main(["check", "hard_negatives", "--device", "cpu"]) == 0
    assert "checked hard_negatives on cpu" in capsys.readouterr().out

    def red(*_):
        raise AssertionError("wrong")

    monkeypatch.setattr("vlkernels.testing.contract.verify", red)
    assert command.main(["check", "hard_negatives", "--device", "cpu"]) == 1
    assert "FAILED  wrong" in capsys.readouterr().out


def test_unknown_ops_are_named(capsys):
    with pytest.raises(SystemExit):
        command.main(["check", "attentoin"])
    assert "no op named attentoin" in capsys.readouterr().err
