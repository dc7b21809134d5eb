"""The README's table and the plots say what the stored rows say, and rows without provenance say nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import lines, measured, pictures, plots, provenance, report, targets
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


def test_rows_of_the_whole_step_go_on_under_its_new_name(copy):
    old, new = results_of(copy, "uniter_step"), results_of(copy, "train_step")
    others = [line for line in new.read_text().splitlines() if json.loads(line)["benchmark"] != "UNITER-base step"]
    new.write_text("\n".join(others) + "\n")
    assert "| uniter_step: [UNITER-base step](" in report.pages(copy)[copy / "README.md"]
    row = json.loads(old.read_text().splitlines()[-1])
    times = {"padded PyTorch, random": 9.75, "padded PyTorch, bucketed": 8.25, "transformers, random": 1.5}
    row |= {"dtype": "torch.float32", "packed_times_as_fast": times, "date": "2100-01-01T00:00:00+00:00", "source": "s"}
    new.write_text("\n".join([*others, json.dumps(row)]) + "\n")
    page = report.pages(copy)[copy / "README.md"]
    for figure in ("9.75; 2.65 (target 2: met)", "8.25; 1.59 (target 1.08: met)"):
        assert re.search(rf"{re.escape(figure)} \|  \| train_step: \[UNITER-base step\]", page)


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
    for module in (report, pictures):
        monkeypatch.setattr(module, "LINES", tuple(line for line in lines.LINES if line.benchmark not in ("n8192_d512", "n16384_d512")))
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


def test_late_interaction_and_the_floor_are_plotted_once_rows_know_them(copy):
    late, floor = (copy / "docs" / f"{name}.svg" for name in ("late_interaction_batch", "floor"))
    for name in ("late_interaction_loss", "layer_norm"):
        rewrite(results_of(copy, name), lambda row: row | {"roof": None, "peak_bytes": None})
    made = json.loads(results_of(copy, "late_interaction_loss").read_text().splitlines()[-1])
    made |= {"dtype": "torch.float32", "peak_bytes": {"vlkernels": 2**20, "dense": 2**24}}
    made |= {"roof": {"flops": 1e12, "bytes": 1e10}}
    made |= {"seconds": {"vlkernels": {"median": 0.5}, "dense": {"median": 1.0}}, "date": "2100-01-01T00:00:00+00:00"}
    made["cost"] = {"forward_bytes": 1e9, "forward_flops": 1e10, "backward_bytes": 1e8, "backward_flops": 1e11}
    with results_of(copy, "late_interaction_loss").open("a") as file:
        file.writelines(json.dumps(made | {"benchmark": f"filip n{pairs} p49 t5-32 d256"}) + "\n" for pairs in (64, 128, 256))
    pages = report.pages(copy)
    assert pages[late].count("<circle") == 2 * 3 + 2 * 3 and "times as fast" not in pages[late]
    assert ">40<" in pages[floor], "0.1 s of bytes and 0.1 of products, of 0.5"
    assert all(f"](docs/{path.name})" in pages[copy / "README.md"] for path in (late, floor))
    assert {late, floor} <= {*report.stale(pages)}


CARD = {name: "there" for name in (*provenance.REQUIRED, *provenance.REQUIRED_OF_A_CARD, "source")} | {"modified": False}


def card_row(copy: Path, reading: targets.Reading) -> dict[str, Any]:
    """What a run of a card would store for it, with every peer that is declared: ours takes 1 s, the others 2 to 3."""
    spec = next((spec for spec in ops.specs() if spec.name == reading.file), None)
    peers = benchmarks_of(spec, "cuda")[reading.benchmark].peers if spec else {}
    medians = {"vlkernels": {"median": 1.0}} | {peer: {"median": 2 + n / 100} for n, peer in enumerate(peers)}
    rates = {"tflops": {"vlkernels": 321.4}, "share_of_copy": {"vlkernels": 0.876}}
    row = {"op": reading.benchmark, **({"benchmark": reading.benchmark, "dtype": "torch.bfloat16"} if spec else {})}
    row |= {"seconds": medians, "forward": medians, "backward": medians, "derived": {"forward": rates, "backward": rates}}
    return row | CARD | {"date": "2026-12-01T00:00:00+00:00", "device": "NVIDIA H200", "arch": "sm_90"}


def test_every_target_of_a_card_reads_a_declared_row_and_none_is_measured_without_one(copy):
    assert all(target.told([]) == targets.UNMEASURED for target in targets.TARGETS) and len(targets.TARGETS) == 14
    folder = copy / "benchmarks" / "results" / "nvidia-h200"
    folder.mkdir()
    for reading in {(r.file, r.benchmark): r for target in targets.TARGETS for r in target.readings}.values():
        with (folder / f"{reading.file}.jsonl").open("a") as file:
            file.write(json.dumps(card_row(copy, reading)) + "\n")
    told = report.pages(copy)[copy / "README.md"].partition("On a card: ")[2].splitlines()
    assert told[0] == "NVIDIA H200, sm_90, 2026-12-01."
    measured_ = {line.split(" | ")[0]: line.split(" | ")[-1].rstrip(" |") for line in told[4:18]}
    assert targets.UNMEASURED not in "".join(measured_.values())
    assert measured_["| the same, backward"] == "321 / 321" and measured_["| dropout 0.1: times as long as without"] == "0.5"
    by_word = {name.split()[1]: value for name, value in measured_.items()}
    assert by_word["host"] == "1e+06 / 1e+06" and by_word["pack"] == "0.876 / 0.876 / 2"


def test_a_card_row_without_its_provenance_is_refused(copy):
    folder = copy / "benchmarks" / "results" / "nvidia-h200"
    folder.mkdir()
    row = card_row(copy, targets.TARGETS[0].readings[0])
    for field in provenance.REQUIRED_OF_A_CARD:
        (folder / "attention_qkvpacked.jsonl").write_text(json.dumps({k: v for k, v in row.items() if k != field}) + "\n")
        with pytest.raises(Refused, match=f"its provenance has no {field}$"):
            report.pages(copy)


def test_bars_are_as_long_as_they_say():
    bars = [plots.Bar("a", {"x": 50.0, "y": 100.0}), plots.Bar("b", {"y": 25.0})]
    drawn = plots.draw_bars("share", bars, ("x", "y"), ["where"])
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="11"', drawn)]
    assert widths == [0.5 * plots.BARS_WIDTH, plots.BARS_WIDTH, 0.25 * plots.BARS_WIDTH] and drawn.count(">where<") == 1


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
    assert len(lines.LINES) <= 26


def test_rows_of_one_heap_are_not_shown_for_another():
    def row(times: float, **heap: str) -> measured.Row:
        seconds = {"vlkernels": {"median": 1.0}, "torch": {"median": times}}
        return measured.Row(Path("a.jsonl"), 1, {"benchmark": "b", "dtype": "torch.float32", "seconds": seconds, **heap})

    rows = [row(1.1), row(1.2, heap="kept"), row(1.8, heap="default")]
    line = lines.Line("what", "against", "a", "b", ("torch",))
    assert [figure.times for figure in line.figures(rows, "float32")] == [1.2, 1.1]
    assert [figure.times for figure in dataclasses.replace(line, heap="default").figures(rows, "float32")] == [1.8]


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
