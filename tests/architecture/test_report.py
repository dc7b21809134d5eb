"""The README's table and the plots say what the stored rows say, and rows without provenance say nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import lines, measured, plots, provenance, report
from benchmarks.measured import Refused
from benchmarks.run import benchmarks_of
from vlkernels import ops

RUN = "run `python -m benchmarks.report` and commit what it writes"
FIELDS = (*provenance.REQUIRED, *provenance.REQUIRED_OF_A_PROCESSOR, "source")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the report reads and writes, to be tampered with."""
    shutil.copy(provenance.ROOT / "README.md", tmp_path)
    (tmp_path / "docs").mkdir()
    for path in (provenance.ROOT / "docs").glob("*.svg"):
        shutil.copy(path, tmp_path / "docs")
    for folder in provenance.RESULTS.glob("cpu-*"):
        shutil.copytree(folder, tmp_path / "benchmarks" / "results" / folder.name)
    return tmp_path


def rewrite(path: Path, change: Any) -> None:
    """``change`` takes a row and gives one, or ``None``."""
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


def results_of(root: Path, name: str) -> Path:
    machine = report.told_machine(measured.read(root / "benchmarks" / "results"))
    return root / "benchmarks" / "results" / machine.folder / f"{name}.jsonl"


def test_the_readme_and_the_plots_are_not_stale():
    old = report.stale(report.pages(provenance.ROOT))
    assert not old, f"{', '.join(path.name for path in old)}: {RUN}"


def test_a_changed_figure_is_found_and_written_anew(copy, capsys):
    readme = copy / "README.md"
    text = readme.read_text()
    begin, end = text.index(report.BEGIN), text.index(report.END)
    figure = re.search(r"\d\.\d\d", text[begin:end])
    readme.write_text(text[: begin + figure.start()] + "9.99" + text[begin + figure.end() :])
    plot = copy / "docs" / "attention_padding.svg"
    drawn = plot.read_text()
    plot.write_text(drawn.replace("<circle cx=", '<circle cx="1" cx=', 1))
    assert report.main(["--check"], copy) == 1
    told = capsys.readouterr().out.splitlines()
    assert told == [f"{name}: stale: run `python -m benchmarks.report`" for name in ("README.md", "docs/attention_padding.svg")]
    assert report.main([], copy) == 0 and report.main(["--check"], copy) == 0
    assert readme.read_text() == text and plot.read_text() == drawn


def test_a_missing_plot_is_stale(copy):
    (copy / "docs" / "attention_padding.svg").unlink()
    assert [path.name for path in report.stale(report.pages(copy))] == ["attention_padding.svg"]


def test_a_new_row_makes_the_table_stale(copy):
    path = results_of(copy, "rms_norm")
    row = json.loads(path.read_text().splitlines()[0])
    row["seconds"]["vlkernels"]["median"] /= 2
    with path.open("a") as file:
        file.write(json.dumps(row | {"date": "2100-01-01T00:00:00+00:00"}) + "\n")
    assert "README.md" in {path.name for path in report.stale(report.pages(copy))}


@pytest.mark.parametrize("field", FIELDS)
def test_a_row_without_its_provenance_is_refused(copy, field, capsys):
    path = results_of(copy, "rms_norm")
    number = len(path.read_text().splitlines()) + 1
    row = {"op": "rms_norm", "benchmark": "anything", "dtype": "torch.float32", **provenance.provenance("cpu")}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    report.pages(copy)
    rewrite(path, lambda found: {k: v for k, v in found.items() if k != field or found["benchmark"] != "anything"})
    assert report.main([], copy) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"/rms_norm\.jsonl:{number}: not shown, its provenance has no {field}$", told)


def test_a_row_that_says_nothing_of_its_device_or_is_no_json_is_refused(copy):
    path = results_of(copy, "rms_norm")
    rewrite(path, lambda row: row | {"device": None})
    with pytest.raises(Refused, match=r"rms_norm\.jsonl:1: not shown, its provenance has no device$"):
        report.pages(copy)
    for line in ('{"op": ', "3"):
        path.write_text(f"{line}\n")
        with pytest.raises(Refused, match=r"rms_norm\.jsonl:1: not an object of JSON$"):
            report.pages(copy)


def test_a_new_row_has_what_is_required(monkeypatch):
    row = provenance.provenance("cpu")
    assert set(row) == set(FIELDS) and provenance.lacking(row, on_card=False) == []
    assert provenance.lacking(row, on_card=True) == list(provenance.REQUIRED_OF_A_CARD)
    card = SimpleNamespace(name="a card", major=9, minor=0)
    monkeypatch.setattr(provenance.torch.cuda, "get_device_properties", lambda _: card)
    assert set(provenance.provenance("cuda")) == {*provenance.REQUIRED, *provenance.REQUIRED_OF_A_CARD, "source"}


def test_rows_older_than_the_digest_are_shown_where_a_commit_names_their_code(copy):
    path = results_of(copy, "rms_norm")
    old = {"date": "2026-11-20T10:00:00+00:00", "benchmark": "old"}

    def found() -> int:
        return sum(row.values.get("benchmark") == "old" for row in measured.read(copy / "benchmarks" / "results"))

    rewrite(path, lambda row: {k: v for k, v in (row | old).items() if k != "source"})
    assert found() == len(path.read_text().splitlines())
    rewrite(path, lambda row: row | {"modified": True})
    assert found() == 0


def test_a_line_whose_rows_vanished_is_an_error(copy):
    rewrite(results_of(copy, "rms_norm"), lambda row: None if row["dtype"] == "torch.bfloat16" else row)
    with pytest.raises(Refused, match=r"'RMSNorm\(x \+ residual\)' has no row of rms_norm, .*, bfloat16, .*: run `make bench`"):
        report.pages(copy)


def test_a_row_in_which_a_peer_did_not_run_makes_no_line(copy):
    def without_eager(row):
        row["seconds"].pop("eager")
        return row

    rewrite(results_of(copy, "rms_norm"), without_eager)
    with pytest.raises(Refused, match="that measured eager"):
        report.pages(copy)


def test_a_run_of_a_changed_tree_is_marked(copy):
    path = results_of(copy, "rms_norm")
    for modified, mark in ((False, ""), (True, r"\*"), (None, r"\*")):
        rewrite(path, lambda row, modified=modified: row | {"modified": modified})
        (line,) = [line for line in report.pages(copy)[copy / "README.md"].splitlines() if line.startswith("| RMSNorm")]
        assert all(re.fullmatch(r"[\d.]+" + re.escape(mark), times.strip()) for times in re.split(r"[|;]", line)[3:5])


def test_the_machine_with_every_line_is_told(copy):
    """Another one only once it has them all; then, if it is newer."""
    here = results_of(copy, "pack").parent
    there = here.with_name("cpu-other")
    shutil.copytree(here, there)
    for path in there.glob("*.jsonl"):
        rewrite(path, lambda row: row | {"device": "Another", "source": "s", "date": row["date"].replace("2026", "2027")})
    assert "\nAnother, " in report.pages(copy)[copy / "README.md"]
    (there / "rms_norm.jsonl").unlink()
    assert not report.stale(report.pages(copy))


def test_time_and_memory_are_plotted_once_the_memory_of_two_batches_is_known(copy, monkeypatch):
    monkeypatch.setattr(report, "LINES", tuple(line for line in report.LINES if line.benchmark != "n16384_d512"))
    path = results_of(copy, "contrastive_loss")
    rewrite(path, lambda row: row if row["benchmark"] in ("n4096_d512", "quickstart_n128_d64") else None)
    plot = copy / "docs" / "contrastive_batch.svg"
    assert plot not in report.pages(copy)
    made = next(row for row in map(json.loads, path.read_text().splitlines()) if row["benchmark"] == "n4096_d512")
    for pairs in (8192, 16384):
        peaks = {"peak_bytes": {"vlkernels": pairs * 2**14, "torch": pairs * 2**18}}
        with path.open("a") as file:
            file.write(json.dumps(made | {"benchmark": f"n{pairs}_d512", "dtype": "torch.float32"} | peaks) + "\n")
    pages = report.pages(copy)
    assert "](docs/contrastive_batch.svg)" in pages[copy / "README.md"] and pages[plot].count("<circle") == 2 * 3 + 2 * 2
    assert all(told in pages[plot] for told in (made["device"], made["date"][:10], made["commit"][:10]))


def test_the_order_of_rows_in_a_file_tells_nothing(copy):
    path = results_of(copy, "layer_norm")
    told = report.pages(copy)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert report.pages(copy) == told


def test_every_line_names_a_benchmark_and_peers_that_are_declared():
    declared = {spec.name: benchmarks_of(spec, "cpu") for spec in ops.specs()}
    for line in lines.LINES:
        if line.file in declared:
            benchmark = declared[line.file][line.benchmark]
            assert set(line.peers) <= set(benchmark.peers), line
            assert {f"torch.{dtype}" for dtype in line.dtypes} <= set(map(str, benchmark.dtypes)), line
    assert len(lines.LINES) <= 24


def test_the_best_peer_counts():
    def row(**taken: float) -> measured.Row:
        return measured.Row(Path("a"), 1, {"seconds": {name: {"median": median} for name, median in taken.items()}})

    rows = [row(ours=1.0, slow=3.0, fast=2.0), row(ours=1.0, slow=9.0), row(ours=1.0, slow=5.0, fast=4.0)]
    found = measured.figures(rows, measured.seconds, "ours", ("slow", "fast"))
    assert [figure.times for figure in found] == [4.0, 2.0]


@pytest.mark.parametrize(
    "times, told", ((2.0, "target 2: met"), (1.999, "target 2: 0.1 % short"), (1.5, "target 2: 25 % short"))
)
def test_a_target_is_met_or_its_shortfall_told(times, told):
    assert report.judged(times, 2.0) == told


def test_ticks_enclose_the_values():
    assert plots.ticks([1.7, 19]) == [1, 2, 5, 10, 20]
    assert plots.ticks([100, 100]) == [100, 200]


def test_make_bench_ends_with_the_report():
    recipe = re.search(r"^bench: setup\n((?:\t.*\n)+)", (provenance.ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe[1].splitlines()[-1] == "\t$(RUN) -m benchmarks.report"
