"""What the ops that only move bytes are timed beside: each row for a card runs here, small, and its peers compute the same."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.roof import Roof
from tests.ops import library_standins
from vlkernels import ops
from vlkernels.core.spec import InputMaker
from vlkernels.ops.embed_layer_norm import benchmarks as embedding
from vlkernels.ops.layer_norm import benchmarks as norms
from vlkernels.ops.packing import benchmarks as packing
from vlkernels.ops.patchify import benchmarks as patchify

SHRINK = 512
SPECS = {spec.name: spec for spec in ops.specs()}
ROWS = {
    "layer_norm": norms.layer_norm,
    "rms_norm": norms.rms_norm,
    "embed_layer_norm": embedding.embed_layer_norm,
    "pack": packing.pack,
    "unpack": packing.unpack,
    "take_rows": packing.take_rows,
    "patchify": patchify.patchify,
}
CARD = [(op, name) for op, rows in ROWS.items() for name, row in rows().items() if "cuda" in row.devices]
NEED_A_LIBRARY = {
    "apex FusedLayerNorm",
    "apex FastLayerNorm",
    "apex FusedRMSNorm",
    "Liger",
    "flash-attn Triton",
    "QuACK",
    "cat + flash-attn's unpad_input",
    "flash-attn's pad_input, index ready",
    "flash-attn's index_first_axis",
}


@pytest.fixture
def quick_compiler(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, backend, dynamic: compile(call, backend="aot_eager", dynamic=dynamic))


def timed(op, name, dtype, device):
    spec = SPECS[op]
    benchmark = run.benchmarks_of(dataclasses.replace(spec, benchmarks={name: ROWS[op](SHRINK)[name]}), "cuda")[name]
    roofs = dict.fromkeys((torch.float32, torch.bfloat16), Roof(flops=1e12, bytes=1e11))
    here = run.Run(device, 0.0, Path("unused"), roofs=roofs)
    return benchmark, run.timed(spec, name, benchmark, dtype, here)


@pytest.mark.parametrize("op, name", CARD)
def test_the_rows_of_a_card_run_and_their_peers_compute_the_same(op, name, monkeypatch, quick_compiler, capsys):
    library_standins.install(monkeypatch)
    for dtype in run.benchmarks_of(SPECS[op], "cuda")[name].dtypes:
        benchmark, row = timed(op, name, dtype, "cpu")
        assert set(row["seconds"]) == {"vlkernels", *benchmark.peers, run.COPY}, capsys.readouterr().out
        assert row["absent"] == {} and row["peak_bytes"] is None
        for part in run.DIRECTIONS:
            derived = row["derived"][part]
            assert set(derived) == {"gb_per_s", "share_of_copy", "share_of_roof", "best_peer"}
            assert derived["share_of_copy"][run.COPY] == 1 and derived["best_peer"]["name"] in benchmark.peers
        assert f"{op}, {name}" in capsys.readouterr().out


@pytest.mark.parametrize("op", ROWS)
def test_a_library_that_is_not_there_is_named_with_its_reason(op, quick_compiler, capsys):
    name = next(name for o, name in CARD if o == op)
    benchmark, row = timed(op, name, torch.bfloat16, "cpu")
    assert set(row["absent"]) == NEED_A_LIBRARY & set(benchmark.peers) == set(benchmark.peers) - set(row["seconds"])
    told = capsys.readouterr().out
    for peer, reason in row["absent"].items():
        assert reason.startswith("No module named") and f"  {peer} does not run here: {reason}\n" in told


@pytest.mark.gpu
@pytest.mark.parametrize("op, name", CARD)
def test_the_rows_of_a_card_run_small_on_it(op, name):
    benchmark, row = timed(op, name, torch.bfloat16, "cuda")
    assert set(row["absent"]) <= NEED_A_LIBRARY, row["absent"]
    assert set(row["peak_bytes"]) == set(row["seconds"]) - {run.COPY} and min(row["peak_bytes"].values()) > 0


def test_names_say_what_is_timed(monkeypatch):
    for draw in ("drawn", "normal"):
        monkeypatch.setattr(InputMaker, draw, lambda fill, *shape: torch.empty(shape, device="meta"))
    for op, name in CARD:
        row = ROWS[op]()[name]
        made = row.make(InputMaker(torch.bfloat16))
        rows, width = len(made.get("ids", made.get("x", ()))), shared_width(made)
        samples = made["layout"].num_samples if "layout" in made else None
        residual = "residual " if "residual" in made else ""
        fused = f"bias, dropout 0.1, {residual}" if "linear_bias" in made else residual
        expected = {
            "layer_norm": f"{fused}{rows}x{width}",
            "rms_norm": f"{fused}{rows}x{width}",
            "take_rows": f"15% of {rows} rows, D{width}",
            "pack": f"{samples} x 12..60 + 39..196, D{width}",
            "unpack": f"{samples} x 12..60 + 39..196, D{width}",
            "patchify": f"{samples} images, {'native' if 'sizes' in made else 'equal'} sizes",
            "embed_layer_norm": f"UNITER, {samples} x 8..32 + 10..62, D{width}, dropout 0.1"
            if samples
            else f"BERT {rows}x{width}, dropout 0.1",
        }
        assert name == expected[op] and row.devices == ("cuda",) and row.dtypes[0] == torch.bfloat16
        assert made.get("dropout_p") == (0.1 if "dropout" in name else None)


def shared_width(made):
    tensors = [made[name] for name in ("x", "images") if name in made] or [*made.get("tensors", ()), *made.get("tables", ())]
    (width,) = {t.shape[-1] for t in tensors}
    return width


def test_every_op_has_one_row_in_float32():
    for op, rows in ROWS.items():
        wide = [name for name, row in rows().items() if "cuda" in row.devices and torch.float32 in row.dtypes]
        assert len(wide) == (2 if op in ("layer_norm", "rms_norm") else 1), op


def test_the_bytes_that_must_move():
    unit = 7 * 16 * 4
    x, row = torch.randn(7, 16), torch.randn(16)
    for options, forward, backward in (
        ({}, 2, 3),
        ({"residual": x}, 4, 3),
        ({"linear_bias": row}, 3, 3),
        ({"residual": x, "dropout_p": 0.1}, 4, 4),
        ({"row_scale": torch.ones(7)}, 3, 4),
    ):
        assert norms.cost(x, weight=row, bias=row, **options) == norms.Cost(forward * unit, backward * unit), options
    arguments = packing.pack(SHRINK)["256 x 12..60 + 39..196, D768"].make(InputMaker(torch.bfloat16))
    layout, width = arguments["layout"], arguments["tensors"][0].shape[2]
    tokens, padded = layout.num_tokens, sum(t.numel() for t in arguments["tensors"]) // width
    assert packing.pack_cost(**arguments) == packing.Cost(2 * tokens * width * 2, (tokens + padded) * width * 2)
    ids, tables = torch.tensor([[3, 0], [3, -1], [1, 1]]), [torch.randn(5, 16), torch.randn(2, 16)]
    read, written = 2 + 2, 5 + 2
    expected = embedding.Cost((read + 3) * 64, (3 + read + written) * 64)
    assert embedding.cost(ids=ids, tables=tables, weight=row) == expected
    dense = torch.randn(3, 16)
    assert embedding.cost(ids=None, tables=[], weight=row, dense=dense) == embedding.Cost(2 * 3 * 64, 3 * 3 * 64)


def test_what_is_packed_is_padded_by_two_fifths():
    for name, row in packing.pack().items():
        if "cuda" in row.devices:
            samples = int(name.split(" x ")[0])
            layout = packing._lengths(InputMaker(torch.bfloat16), samples, (packing.TEXT, packing.IMAGE))
            assert 0.55 < layout.num_tokens / (samples * (packing.TEXT + packing.IMAGE)) < 0.65, name
