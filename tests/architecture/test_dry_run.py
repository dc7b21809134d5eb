"""The dry run compiles what the rows of a card would launch, and says who cannot run beside them."""

import dataclasses

import pytest
import torch

from vlkernels import ops
from vlkernels.core import triton_runtime
from vlkernels.core.spec import Benchmark, Peer
from vlkernels.core.triton_runtime import Launch

pytest.importorskip("triton")

from benchmarks import dry_run, run  # noqa: E402

SIGMOID, TAKE_ROWS = (next(spec for spec in ops.specs() if spec.name == name) for name in ("sigmoid_loss", "take_rows"))
ROW = "n65536_d768"


def only(monkeypatch, spec, name, **changes):
    """``spec`` with this row alone."""
    row = run.benchmarks_of(spec, "cuda")[name]
    monkeypatch.setattr(ops, "specs", lambda: (dataclasses.replace(spec, benchmarks={name: dataclasses.replace(row, **changes)}),))


def refusing(reason):
    def prepare(**_):
        raise reason

    return Peer(prepare)


def test_the_kernels_of_a_full_size_row_are_compiled_and_none_is_launched(capsys, monkeypatch):
    peers = {"there": refusing(RuntimeError("no data")), "absent": refusing(ImportError("No module named 'theirs'"))}
    only(monkeypatch, SIGMOID, ROW, peers=peers)
    monkeypatch.setattr(Launch, "run", lambda _: pytest.fail("launched"))
    assert run.main(["--dry-run"]) == 0
    row, beside, absent = capsys.readouterr().out.splitlines()
    assert row.startswith(f"sigmoid_loss, {ROW}, bfloat16: pairs_kernel (")
    assert (beside, absent) == ("  beside there", "  absent cannot run here: No module named 'theirs'")
    assert triton_runtime.missing("cuda") is not None or torch.cuda.is_available()  # the card was of this run alone


@pytest.mark.parametrize("fault", ("in the compiler", "in the inputs"))
def test_a_row_that_would_break_on_a_card_fails_here(fault, capsys, monkeypatch):
    def broken(*_):
        raise ValueError("out of resource: shared memory")

    only(monkeypatch, SIGMOID, ROW, **({} if fault == "in the compiler" else {"make": broken}))
    if fault == "in the compiler":
        monkeypatch.setattr(Launch, "compile", broken)
    assert run.main(["--dry-run"]) == 1
    assert f"{ROW}, bfloat16: FAILED: out of resource: shared memory" in capsys.readouterr().out


def test_the_kernels_are_those_of_the_call():
    row = run.benchmarks_of(SIGMOID, "cuda")[ROW]
    both = [dry_run.trial(SIGMOID, row, dtype).kernels["pairs_kernel"] for dtype in (torch.bfloat16, torch.float32)]
    assert len(both[0]) == len(both[1]) == 1 and both[0] != both[1]


def test_an_op_without_triton_kernels_is_called_too(monkeypatch):
    name, row = next(iter(run.benchmarks_of(TAKE_ROWS, "cuda").items()))
    found = dry_run.trial(TAKE_ROWS, row, torch.bfloat16)
    assert found.failure is None and found.kernels == {}
    assert found.told(name, [])[0].startswith(f"{name}: CUDA C++ (")
    wrong = dataclasses.replace(row, make=lambda fill: row.make(fill) | {"positions": fill.normal(3)})
    assert "positions must be" in dry_run.trial(TAKE_ROWS, wrong, torch.bfloat16).failure


def test_a_dry_run_ends_in_time(capsys, monkeypatch):
    only(monkeypatch, SIGMOID, ROW)
    monkeypatch.setattr(dry_run, "trial", lambda *_: pytest.fail("tried"))
    assert run.main(["--dry-run", "--limit-s", "0"]) == 0
    assert capsys.readouterr().out == "1 rows are left: the time of this run is up\n"


def test_every_row_of_a_card_has_a_form_without_data():
    for spec in ops.specs():
        for name, row in run.benchmarks_of(spec, "cuda").items():
            assert isinstance(row, Benchmark) and row.make(dry_run.InputMaker(row.dtypes[0], "meta")), f"{spec.name}, {name}"
