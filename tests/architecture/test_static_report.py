"""What `make static` stored is what the kernels of this tree compile to; and a card's limits are obeyed."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

import vlkernels as vk
from vlkernels import ops

triton = pytest.importorskip("triton")

from benchmarks import offline, static, static_changes  # noqa: E402
from vlkernels.core.triton_runtime import Launch  # noqa: E402
from vlkernels.ops.attention.gpu import variants  # noqa: E402
from vlkernels.ops.sigmoid_loss.gpu import variants as sigmoid  # noqa: E402
from vlkernels.ops.triplet_loss.gpu import variants as triplet  # noqa: E402

SPECS = [spec for spec in ops.specs() if spec.variants is not None]


def rows(spec):
    return [json.loads(line) for line in static.stored_at(spec).read_text().splitlines()]


def is_representative(architecture, facts):
    """The head widths of vision-language models on the card of the targets, and the narrower one without options elsewhere."""
    if facts["dtype"] == "float32" or facts.get("head_dim") not in (None, 64, 128):
        return False
    return architecture == 90 or (facts.get("head_dim") == 64 and facts["dtype"] == "bfloat16" and not {"bias", "slot"} & {*facts})


def same_compiler(spec):
    return {row["triton"] for row in rows(spec)} == {triton.__version__}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_the_stored_report_is_of_these_kernels(spec):
    if not same_compiler(spec):
        pytest.skip("the report is of another Triton")
    wanted = {static.describe(architecture, variant)["identity"] for architecture, variant in static.declared(spec)}
    assert wanted == set(static.stored(spec)), "run `make static`"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_representative_kernels_compile_to_what_is_stored(spec):
    if not same_compiler(spec):
        pytest.skip("the report is of another Triton")
    for architecture, variant in static.declared(spec):
        if is_representative(architecture, variant.facts):
            row = static.describe(architecture, variant)
            fresh = {**row, **static.compile_and_measure(architecture, variant)}
            assert json.loads(json.dumps(fresh)) == static.stored(spec)[row["identity"]]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_kernels_fit_their_cards(spec):
    for row in rows(spec):
        name = f"{row['kernel']} sm_{row['architecture']}, {row['constants']}"
        assert row["programs_per_sm"] >= 1, f"{name} does not fit"
        if row["dtype"] == "float32":
            continue
        if row["dtype"] == "int32":
            assert row["stack_bytes"] == 0, f"{name} spills"
            continue
        if row.get("products", True):
            assert sum(row["opcodes"].get(opcode, 0) for opcode in offline.TENSOR_CORE) > 0, f"{name} has no tensor-core instruction"
        if row["architecture"] in (90, 100) and row.get("head_dim", 0) <= 128:
            assert offline.local_memory_accesses(row) == 0, f"{name} spills"
        else:
            assert row["stack_bytes"] <= 64, f"{name} spills {row['stack_bytes']} bytes"


def test_a_kernel_that_got_worse_is_told(tmp_path, monkeypatch, capsys):
    """One that is compiled here beside a stored line that is doctored: fewer registers, no spills, more tensor-core instructions."""
    spec = next(spec for spec in SPECS if spec.name == "sigmoid_loss")
    lines = static.stored_at(spec).read_text().splitlines()
    monkeypatch.setattr(static, "FOLDER", tmp_path)
    monkeypatch.setattr(static.multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=lambda _: InOneProcess(lines)))

    def write(change=dict):
        old = [json.loads(line) for line in lines]
        old[0] = change(old[0])
        static.stored_at(spec).write_text("".join(json.dumps(row) + "\n" for row in old))
        static.write(spec, workers=1)
        return capsys.readouterr().out.splitlines()

    first = json.loads(lines[0])
    named = f"kernel pairs, dtype {first['dtype']}, width {first['width']}, labels False, gradient True, architecture 80"
    assert write() == [f"sigmoid_loss: {len(lines)} kernels as stored, 0 others no worse"]
    fewer = {"registers": first["registers"] - 1, "instructions": first["instructions"] - 5}
    assert write(lambda row: row | fewer)[0] == (
        f"sigmoid_loss WORSE: {named}: registers {first['registers'] - 1} -> {first['registers']}, "
        f"instructions {first['instructions'] - 5} -> {first['instructions']}"
    )
    assert write(lambda row: row | {"registers": 255})[-1] == f"sigmoid_loss: {len(lines) - 1} kernels as stored, 1 others no worse"
    told = write(lambda row: row | {"width": 11})
    assert told[:2] == [f"sigmoid_loss gone: {named.replace('width 512', 'width 11')}", f"sigmoid_loss new: {named}"]


@pytest.mark.parametrize(
    "name, change, told",
    (
        ("shared_bytes", 100, "bytes of shared memory 100 -> 200"),
        ("stack_bytes", 0, "bytes of stack 0 -> 8"),
        ("programs_per_sm", 3, "programs per multiprocessor 3 -> 2"),
        ("opcodes", {"LDL": 1, "HMMA": 9}, "local accesses 1 -> 3"),
        ("opcodes", {"LDL": 2, "STL": 1, "HMMA": 10}, "tensor-core instructions 10 -> 9"),
    ),
)
def test_what_counts_as_worse(name, change, told):
    row = {"registers": 9, "shared_bytes": 200, "stack_bytes": 8, "programs_per_sm": 2, "instructions": 50}
    row["opcodes"] = {"LDL": 2, "STL": 1, "HMMA": 9}
    assert list(static_changes.regressions(row | {name: change}, row)) == [told]
    assert list(static_changes.regressions(row, row | {name: change})) == []


class InOneProcess:
    """A pool whose compiler gives the lines that are stored."""

    def __init__(self, lines):
        self.lines = lines

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, numbers, chunksize):
        return [self.lines[number] for number in numbers]


def test_an_edited_kernel_has_another_identity():
    architecture, variant = next(static.declared(SPECS[0]))
    before = static.describe(architecture, variant)["identity"]
    launch = variant.launch
    more = Launch(launch.kernel, launch.grid, launch.arguments, launch.constants, launch.warps, launch.stages + 1)
    changed = type(variant)(variant.kernel, variant.facts, more)
    assert static.describe(architecture, changed)["identity"] != before
    assert static.describe(architecture + 10, variant)["identity"] != before


def test_a_thousand_layouts_compile_each_kernel_once():
    draw, compiled = random.Random(0), {}
    with offline.card(90):
        for _ in range(1000):
            samples = draw.randint(1, 40)
            layout = vk.SegmentLayout([[draw.randint(0, 640), draw.choice((1, 16, draw.randint(0, 77)))] for _ in range(samples)])
            for kernel, launch in variants.launches(torch.bfloat16, 16, False, 90, layout).items():
                compiled.setdefault(kernel, set()).add(launch.compile().hash)
    assert {kernel: len(hashes) for kernel, hashes in compiled.items()} == {kernel: 1 for kernel in compiled}


def test_batches_of_every_size_compile_each_kernel_once():
    compiled = {}
    with offline.card(90):
        for size in ((1, 1), (16, 17), (300, 300), (4097, 9001)):
            launches = {"pairs": sigmoid.pairs_launch(torch.bfloat16, 64, True, True, 90, *size)}
            for kernel, launch in (launches | triplet.call_launches(torch.bfloat16, 64, True, 90, *size)).items():
                compiled.setdefault(kernel, set()).add(launch.compile().hash)
    assert {kernel: len(hashes) for kernel, hashes in compiled.items()} == {"pairs": 1, "hardest": 1, "exceeding": 1}


def test_occupancy_is_cudas():
    assert offline.resident_programs(90, registers=227, shared=64 * 1024, warps=4) == 2
    assert offline.resident_programs(120, registers=227, shared=64 * 1024, warps=4) == 1
    assert offline.resident_programs(80, registers=32, shared=0, warps=4) == 16
