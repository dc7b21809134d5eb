"""The runner stores what it measured with its provenance, and times nothing that is wrong."""

import contextlib
import gc
import json
import subprocess
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import host_cost, launches, memory, provenance, roof, run, timing
from benchmarks.provenance import CardLog
from vlkernels import ops
from vlkernels.core import dispatch
from vlkernels.core.dispatch import Implementation
from vlkernels.core.spec import Benchmark, Cost, InputMaker
from vlkernels.testing import contract

@pytest.fixture(autouse=True)
def small_roof(monkeypatch):
    monkeypatch.setitem(roof.SIZES, "cpu", (64, 2**20))


ARGUMENTS = ["--device", "cpu", "--budget-s", "0"]


def test_results_carry_their_provenance(tmp_path):
    assert run.main([*ARGUMENTS, "--op", "segment_mean", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cpu-*/segment_mean.jsonl")
    row = json.loads(path.read_text().splitlines()[0])
    assert {"op", "benchmark", "dtype", "seconds", "commit", "modified", "torch", "device", "threads", "date"} <= row.keys()
    assert row["seconds"]["vlkernels"]["median"] > 0 and "reference" in row["seconds"]
    parts = [row[part]["vlkernels"]["median"] for part in ("forward", "backward")]
    assert min(parts) > 0 and row["derived"]["forward"]["best_peer"]["name"] == "index_add"
    assert min(row["roof"].values()) > 1e6 and row["derived"]["backward"]["share_of_roof"]["vlkernels"] > 0


def test_the_rows_of_a_card_are_listed_without_one(capsys, monkeypatch):
    monkeypatch.setattr(run, "run_op", lambda *_: pytest.fail("timed"))
    assert run.main(["--device", "cuda", "--list", "--op", "take_rows", "--op", "segment_mean"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("take_rows, 15% of 65536 rows, D768, bfloat16 and float32: beside index_select; torch.compile; ")
    assert told[-1] == "segment_mean, regions, float32 and bfloat16: beside reference; index_add"


def test_a_red_contract_prints_no_time(tmp_path, capsys, monkeypatch):
    def red(*_):
        raise AssertionError("wrong by 3")

    monkeypatch.setattr(contract, "verify", red)
    assert run.main([*ARGUMENTS, "--op", "hard_negatives", "--results", str(tmp_path)]) == 1
    assert "contract is red, not timed: wrong by 3" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ("wrong", "crashing"))
def test_an_op_with_a_faulty_kernel_prints_no_time_and_the_others_do(fault, tmp_path, capsys, monkeypatch):
    """The gate is the contract itself: its kernel is a hundredth off, or fails as a device does."""
    choices = (Implementation("torch"), Implementation("reference"))

    def faulty(x, layout, segment, impl="auto"):
        mean = SEGMENT_MEAN.reference(x, layout, segment)
        if dispatch.resolve("faulty", impl, choices, x.device) == "reference":
            return mean
        if fault == "crashing":
            raise torch.AcceleratorError("an illegal memory access was encountered\nand a long trace")
        return 1.01 * mean

    red = replace(SEGMENT_MEAN, name="faulty", functional=faulty, implementations=choices)
    monkeypatch.setattr(ops, "specs", lambda: (red, SEGMENT_MEAN))
    assert run.main([*ARGUMENTS, "--results", str(tmp_path)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("faulty: contract is red, not timed: ") and "faulty" not in "".join(told[1:])
    assert any(line.startswith("segment_mean, regions") for line in told)
    assert [path.name for path in tmp_path.glob("*/*")] == ["segment_mean.jsonl"]


def test_a_second_run_times_what_the_first_one_left(tmp_path, capsys, monkeypatch):
    arguments = [*ARGUMENTS, "--op", "segment_mean", "--results", str(tmp_path)]
    row = SEGMENT_MEAN.benchmarks["regions"]
    whole, part = row.dtypes, replace(row, dtypes=row.dtypes[:1])
    monkeypatch.setattr(ops, "specs", lambda: (replace(SEGMENT_MEAN, benchmarks={"regions": part}),))
    assert run.main(arguments) == 0
    monkeypatch.setattr(ops, "specs", lambda: (SEGMENT_MEAN,))
    assert run.main([*arguments, "--missing"]) == 0
    (path,) = tmp_path.glob("*/*")
    assert [json.loads(line)["dtype"] for line in path.read_text().splitlines()] == [str(dtype) for dtype in whole]
    capsys.readouterr()
    assert run.main([*arguments, "--missing"]) == 0 and capsys.readouterr().out == ""
    monkeypatch.setattr(provenance, "source_digest", lambda: "another source")
    assert run.main([*arguments, "--missing"]) == 0
    assert len(path.read_text().splitlines()) == 2 * len(whole)
    assert run.main([*arguments, "--missing", "--heap", "default"]) == 0
    heaps = [json.loads(line)["heap"] for line in path.read_text().splitlines()]
    assert heaps == ["kept"] * 2 * len(whole) + ["default"] * len(whole)


SEGMENT_MEAN = next(spec for spec in ops.specs() if spec.name == "segment_mean")


def test_a_run_that_is_over_starts_nothing(tmp_path, capsys):
    assert run.main([*ARGUMENTS, "--op", "segment_mean", "--limit-s", "0", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "segment_mean: not timed, the time of this run is up\n"
    here = run.Run("cpu", 0.0, tmp_path, ends=time.monotonic())
    benchmark = run.benchmarks_of(SEGMENT_MEAN, "cpu")["regions"]
    assert run.run_benchmark(SEGMENT_MEAN, "regions", benchmark, here)
    assert "segment_mean, regions, float32: not timed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_benchmarks_are_chosen_by_name(tmp_path, capsys, monkeypatch):
    make = SEGMENT_MEAN.benchmarks["regions"]
    monkeypatch.setattr(ops, "specs", lambda: (replace(SEGMENT_MEAN, cases=(), benchmarks={"one": make, "other": make}),))
    assert run.main([*ARGUMENTS, "--benchmark", "other", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/*")
    assert {json.loads(line)["benchmark"] for line in path.read_text().splitlines()} == {"other"}
    for kind, known in (("op", "segment_mean"), ("benchmark", "one, other")):
        with pytest.raises(SystemExit):
            run.main([*ARGUMENTS, f"--{kind}", "another"])
        assert f"--{kind}: there is no another, only {known}" in capsys.readouterr().err


def test_a_row_that_fails_leaves_the_others(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise torch.OutOfMemoryError("of 140 GiB 139 are in use")

    make = SEGMENT_MEAN.benchmarks["regions"]
    spec = replace(SEGMENT_MEAN, cases=(), benchmarks={"broken": Benchmark(broken), "regions": make})
    monkeypatch.setattr(ops, "specs", lambda: (spec,))
    assert run.main([*ARGUMENTS, "--results", str(tmp_path)]) == 1
    assert "segment_mean, broken, float32: FAILED: of 140 GiB 139 are in use" in capsys.readouterr().out
    (path,) = tmp_path.glob("cpu-*/segment_mean.jsonl")
    assert {json.loads(line)["benchmark"] for line in path.read_text().splitlines()} == {"regions"}


def test_what_is_derived():
    def one(forward, backward=None):
        parts = {"forward": timing.Timing(forward, forward, forward, 5)}
        return parts | ({} if backward is None else {"backward": timing.Timing(backward, backward, backward, 5)})

    timings = {"vlkernels": one(2.0, 4.0), "slow": one(6.0, 6.0), "fast": one(3.0), "not the same": one(1.0, 1.0)}
    cost = Cost(forward_bytes=8, backward_bytes=16, forward_flops=4 * 10**12, backward_flops=10**13)
    forward, backward = run.derive(timings, ["slow", "fast"], cost, roof.Roof(flops=4e12, bytes=10)).values()
    assert forward["tflops"] == {"vlkernels": 2.0, "slow": 4 / 6, "fast": 4 / 3, "not the same": 4.0}
    assert forward["share_of_roof"]["vlkernels"] == 0.5 and backward["share_of_roof"]["vlkernels"] == 2.5 / 4
    assert forward["best_peer"] == {"name": "fast", "times_ours": 1.5}
    assert backward["best_peer"] == {"name": "slow", "times_ours": 1.5}
    assert run.derive(timings, [], None, None) == {"forward": {}, "backward": {}}
    assert roof.Roof(flops=4e12, bytes=10).seconds(4 * 10**12, 80) == 8


def test_where_only_bytes_move_the_rate_is_theirs():
    def one(seconds):
        return {part: timing.Timing(seconds, seconds, seconds, 5) for part in run.DIRECTIONS}

    timings = {"vlkernels": one(4.0), "theirs": one(5.0), run.COPY: one(2.0)}
    cost = Cost(forward_bytes=8 * 10**9, backward_bytes=16 * 10**9)
    forward, backward = run.derive(timings, ["theirs"], cost, roof.Roof(flops=1.0, bytes=8e9)).values()
    assert forward["gb_per_s"] == {"vlkernels": 2.0, "theirs": 1.6, run.COPY: 4.0} and "tflops" not in forward
    assert forward["share_of_copy"] == {"vlkernels": 0.5, "theirs": 0.4, run.COPY: 1.0}
    assert forward["share_of_roof"]["vlkernels"] == 0.25 and backward["share_of_roof"]["vlkernels"] == 0.5
    assert backward["gb_per_s"]["vlkernels"] == 4.0 and forward["best_peer"]["name"] == "theirs"


def test_a_copy_moves_as_many_bytes_as_the_call_must(monkeypatch):
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: copied.append(2 * source.numel()))
    for call in roof.Copies(Cost(forward_bytes=4096, backward_bytes=512), "cpu").parts().values():
        call()
    assert copied == [4096, 512]
    assert list(roof.Copies(Cost(forward_bytes=8), "cpu").parts()) == ["forward"]


def test_a_rate_has_digits_that_say_something():
    told = {0.0912: "0.0912", 0.2: "0.200", 1.852: "1.85", 25.56: "25.6", 4321.9: "4322", 0: "0"}
    assert {value: run.significant(value) for value in told} == told


def test_peak_memory_is_that_of_a_whole_step(monkeypatch):
    """What is there before does not count, what the forward keeps for the backward does."""
    held = {"now": 100, "most": 100}

    def allocate(amount):
        held["now"] += amount
        held["most"] = max(held.values())

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(most=held["now"]))
    x = torch.ones(3, requires_grad=True)
    step = run.Step(lambda: 2 * x, [x], rival=True).trial()
    monkeypatch.setattr(step, "forward", lambda: allocate(30))
    monkeypatch.setattr(step, "backward", lambda: (allocate(12), allocate(-42)))
    held["most"] = 1000
    assert step.peak_bytes() == 42


def test_peak_memory_on_a_cpu_is_what_a_process_of_its_own_holds():
    peak = memory.peak_bytes("segment_mean", "regions", "float32", "vlkernels")
    rows = run.benchmarks_of(next(s for s in ops.specs() if s.name == "segment_mean"), "cpu")["regions"]
    least = rows.make(InputMaker(torch.float32))["x"].nbytes  # of the gradient
    assert least <= peak <= 2 * least


def test_the_roof_is_measured():
    found = roof.measure("cpu", torch.float32)
    assert found.flops > 1e6 and found.bytes > 1e6


def test_kernels_are_counted_and_copies_are_not(monkeypatch):
    def event(name, device=DeviceType.CUDA):
        return SimpleNamespace(name=name, device_type=device)

    events = [event("pairs_kernel"), event("Memset (Device)"), event("Memcpy DtoD"), event("cudaLaunchKernel", DeviceType.CPU)]
    assert launches.kernels([*events, event("gemm")]) == 2
    ran = []
    seen = contextlib.nullcontext(SimpleNamespace(events=lambda: events * len(ran)))
    monkeypatch.setattr(launches, "profile", lambda activities: seen)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran.append("waited"))
    parts = {part: partial(ran.append, part) for part in ("forward", "backward")}
    assert launches.launches(parts) == {"forward": 2, "backward": 4} and ran == ["forward", "waited", "backward", "waited"]
    events.clear()
    assert launches.launches(parts) is None


def test_launches_are_told(capsys):
    one = timing.Timing(1.0, 1.0, 1.0, 5)
    timings, nothing = {"vlkernels": {"forward": one, "total": one}}, {"forward": {}, "backward": {}}
    run.show("row", timings, nothing, None, {"vlkernels": {"forward": 3}})
    assert capsys.readouterr().out.splitlines()[1].endswith("| 3 launches")


class StandInCuda:
    """Events on a clock of its own, which every queued piece of work moves."""

    def __init__(self):
        self.now = 0.0

    def Event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.now

            def synchronize(self):
                pass

            def elapsed_time(self, later):
                return (later.at - self.at) * 1e3

        return Event()


def test_a_card_is_kept_busy_until_the_call_is_queued(monkeypatch):
    cuda, flushes = StandInCuda(), []
    monkeypatch.setattr(timing, "L2_FLUSH_BYTES", 8)
    clock = timing.CudaClock(cuda, "cpu")
    clock._memory = SimpleNamespace(zero_=lambda: flushes.append(cuda.now))
    clock._flush_seconds = 0.001

    def call():
        cuda.now += 0.5
        time.sleep(0.0045)

    first = clock.measure("call", call)
    assert first.seconds == 0.5 and first.host >= 0.0045 and len(flushes) == 1
    flushes.clear()
    clock.measure("call", call)
    assert len(flushes) >= 6, "the host needs 4.5 flushes to queue this call"
    flushes.clear()
    clock.measure("another", call)
    assert len(flushes) == 1


def test_parts_are_timed_one_after_the_other_and_summed():
    order = []
    both = {"forward": lambda: order.append("af"), "backward": lambda: order.append("ab")}
    timings = timing.interleaved_parts({"a": both, "b": {"forward": lambda: None}}, "cpu", 0.0)
    assert order[:4] == ["af", "ab", "af", "ab"] and len(order) == 2 * (timing.WARM_UP_ROUNDS + timing.FEWEST_ROUNDS)
    assert timings["a"].keys() == {"forward", "backward", "total"} and timings["b"].keys() == {"forward", "total"}
    assert timings["a"]["total"].low >= max(timings["a"][part].low for part in ("forward", "backward"))
    assert timings["a"]["total"].runs == timing.FEWEST_ROUNDS


def test_long_rounds_of_warm_variants_count_from_the_first():
    runs = []
    parts = {"long": {"forward": lambda: (runs.append(None), time.sleep(0.02))}}
    timings = timing.interleaved_parts(parts, "cpu", 0.01, warm=True)
    assert timings["long"]["forward"].runs == len(runs) == timing.FEWEST_LONG_ROUNDS


def test_old_objects_are_not_collected_while_the_clock_runs():
    before, seen = gc.get_freeze_count(), []
    timing.interleaved({"call": lambda: seen.append(gc.get_freeze_count())}, "cpu", budget_s=0.0)
    assert min(seen) > 10_000 > before and gc.get_freeze_count() == 0


def test_a_round_longer_than_the_budget_is_repeated_less_often():
    runs = []
    timings = timing.interleaved({"long": lambda: (runs.append(None), time.sleep(0.02))}, "cpu", budget_s=0.01)
    assert timings["long"].runs == timing.FEWEST_LONG_ROUNDS and len(runs) == timing.FEWEST_LONG_ROUNDS + 1


def test_clocks_and_power_are_read_while_numbers_are_taken():
    script = "echo '1980, 3201, 690.5, 61'; echo '[N/A], 1, 2, 3'; echo '1800, 3201, 699.5, 63'; sleep 20"
    with CardLog(("sh", "-c", script)) as card:
        for _ in range(200):
            if len(card._lines) == 3:
                break
            time.sleep(0.01)
        taken = card.take()
        assert taken["sm_mhz"] == [1800, 1890, 1980] and taken["celsius"] == [61, 62, 63]
        assert taken["memory_mhz"] == [3201] * 3 and taken["power_w"] == [690.5, 695, 699.5]
        assert card.take() is None
    assert card._process.returncode is not None
    with CardLog(("no-such-program",)) as card:
        assert card.take() is None


def test_rows_of_this_run_do_not_make_the_source_modified(tmp_path, monkeypatch):
    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *author, *arguments], check=True, capture_output=True)

    source, results = tmp_path / "kernel.py", tmp_path / "benchmarks" / "results" / "op.jsonl"
    results.parent.mkdir(parents=True)
    for file in (source, results):
        file.write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    results.write_text("1\n2\n")
    assert provenance.provenance("cpu")["modified"] is False
    source.write_text("2\n")
    assert provenance.provenance("cpu")["modified"] is True


def test_the_provenance_of_a_card(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, uuid="4d2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = provenance.provenance("cuda")
    assert found["device"] == "NVIDIA H200" and found["arch"] == "sm_90"
    assert found["peers"].keys() == set(provenance.PEER_PACKAGES)
    command = CardLog()._command
    assert command[:2] == ("nvidia-smi", "--id=GPU-4d2")
    assert "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu" in command
    assert len(found["source"]) == 16


@pytest.mark.gpu
def test_a_run_on_a_card(tmp_path, capsys):
    arguments = ["--device", "cuda", "--budget-s", "0", "--op", "segment_mean", "--results", str(tmp_path)]
    assert run.main(arguments) == 0
    assert "TFLOP/s" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/segment_mean.jsonl")
    row = json.loads(path.read_text().splitlines()[0])
    assert row["roof"]["flops"] > 1e12 and row["seconds"]["vlkernels"]["host"] > 0 and row["arch"].startswith("sm_")


def test_host_cost_of_every_call(tmp_path, capsys):
    assert host_cost.main([*ARGUMENTS, "--results", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in next(tmp_path.rglob("host_cost.jsonl")).read_text().splitlines()]
    assert [row["op"] for row in rows] == ["layer_norm", "rms_norm", "take_rows", "pack", "attention"]
    assert all(row[part][who]["median"] > 0 for row in rows for part in ("forward", "backward") for who in ("vlkernels", "plain"))
    assert all(row["commit"] for row in rows)
