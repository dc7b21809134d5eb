"""What attention is timed beside: every row for a card runs here, small, and every peer shows that it computes the same."""

import dataclasses
import random
from functools import partial
from pathlib import Path

import pytest
import torch

import vlkernels as vk
from benchmarks import run
from benchmarks.roof import Roof
from tests.ops.varlen_standin import Standin, rounding
from vlkernels.core.mask import CODES
from vlkernels.core.spec import InputMaker
from vlkernels.ops.attention import benchmarks, peers, spec

CROSS, PACKED = spec.SPECS
SHRINK = 256
CARD = [(PACKED, name) for name in benchmarks.on_a_card(SHRINK)] + [(CROSS, name) for name in benchmarks.across_streams(SHRINK)]


def small_row(op, name):
    rows = benchmarks.across_streams(SHRINK) if op is CROSS else benchmarks.on_a_card(SHRINK)
    made = run.benchmarks_of(dataclasses.replace(op, benchmarks={name: rows[name]}), "cuda")[name]
    if "BlockMask alone" in made.peers:
        return made
    return without(made, benchmarks.FLEX)  # slow to compile, and on a CPU: two rows show it


def without(benchmark, names):
    return dataclasses.replace(benchmark, peers={name: peer for name, peer in benchmark.peers.items() if name not in names})


def timed(op, name, benchmark, device, capsys):
    """The row, and the peers that did not run."""
    roofs = dict.fromkeys((torch.float32, torch.bfloat16), Roof(flops=1e12, bytes=1e11))
    here = run.Run(device, 0.0, Path("unused"), roofs=roofs)
    row = run.timed(op, name, benchmark, torch.bfloat16, here)
    told = capsys.readouterr().out
    assert "computes something else" not in told, told
    for part in run.DIRECTIONS:
        rates, shares = row["derived"][part]["tflops"], row["derived"][part]["share_of_roof"]
        assert rates.keys() == shares.keys() == row[part].keys() and min(rates.values()) > 0
    return row, set(benchmark.peers) - row["seconds"].keys()


@pytest.mark.parametrize("op, name", CARD, ids=lambda x: x if isinstance(x, str) else x.name)
def test_the_rows_of_a_card_run_and_their_peers_compute_the_same(op, name, capsys):
    standin = peers.rival(partial(peers.varlen, lambda: rounding(Standin())))
    benchmark = without(small_row(op, name), set(benchmarks.VARLEN) - {"varlen_attn"})
    if "varlen_attn" in benchmark.peers:
        benchmark = dataclasses.replace(benchmark, peers={**benchmark.peers, "varlen_attn": standin})
    row, missing = timed(op, name, benchmark, "cpu", capsys)
    assert missing <= {"cuDNN SDPA"}
    assert set(row["backward"]) == set(row["seconds"]) - {"FlexAttention", "BlockMask alone"}
    if "varlen_attn" in benchmark.peers:
        assert row["derived"]["forward"]["best_peer"]["name"] in {*benchmarks.VARLEN, *benchmarks.FLEX, *benchmarks.CARD_SDPA}


@pytest.mark.parametrize("op, name", CARD, ids=lambda x: x if isinstance(x, str) else x.name)
def test_nothing_of_ours_stands_around_a_peers_only_call(op, name, monkeypatch):
    row = (benchmarks.across_streams(SHRINK) if op is CROSS else benchmarks.on_a_card(SHRINK))[name]
    if "varlen_attn" not in row.peers:
        return
    around = []
    own = peers.flash.attention
    monkeypatch.setattr(peers.flash, "attention", lambda *a, **k: around.append(1) or own(*a, **k))
    standin = peers.rival(partial(peers.varlen, lambda: rounding(Standin())))
    standin.prepare(**row.make(InputMaker(torch.bfloat16)))
    assert bool(around) == ("prefix-LM" in name)


@pytest.mark.gpu
@pytest.mark.parametrize("op, name", CARD, ids=lambda x: x if isinstance(x, str) else x.name)
def test_the_rows_of_a_card_run_small_on_it(op, name, capsys):
    row, missing = timed(op, name, small_row(op, name), "cuda", capsys)
    assert missing <= {"cuDNN SDPA", "flash-attn 2", "flash-attn 3", "flash-attn 4"}
    assert set(row["backward"]) == set(row["seconds"]) - {"BlockMask alone"}


def test_names_say_what_is_timed(monkeypatch):
    monkeypatch.setattr(InputMaker, "drawn", lambda fill, *shape: torch.empty(0))
    for name, row in benchmarks.on_a_card().items():
        if "tables" in name:
            continue
        samples, lengths = name.split(",")[0].split(" x ")
        layout = row.make(InputMaker(torch.bfloat16))["layout"]
        if ".." not in lengths:
            assert layout.lengths.unique(dim=0).tolist() == [[int(n) for n in lengths.split(" + ")]], name
        assert layout.num_samples == int(samples) and row.devices == ("cuda",) and row.dtypes == (torch.bfloat16,)


@pytest.mark.parametrize("wrong", ("mask", "scale", "gradient"))
def test_a_peer_that_computes_something_else_is_not_timed(wrong, capsys):
    def build(q, k, v, *, layout, mask):
        if wrong == "mask":
            mask = vk.SegmentMask.full(2)
        made = peers.padded(1, q * 1.1 if wrong == "scale" else q, k, v, layout=layout, mask=mask)
        if wrong == "gradient":
            return made._replace(call=lambda: [x + made.inputs[0].sum() - made.inputs[0].sum().detach() for x in made.call()])
        return made

    layout = vk.SegmentLayout([[5, 4], [7, 3]])
    arguments = {"qkv": torch.randn(19, 3, 2, 8, requires_grad=True), "layout": layout, "mask": vk.SegmentMask.prefix_lm()}
    benchmark = run.Benchmark(lambda _: arguments, peers={"wrong": peers.rival(build)}, call=vk.attention_qkvpacked)
    steps = run.variants(benchmark, arguments, run.Run("cpu", 0.0, Path("unused")).tell_absent)
    assert list(steps) == ["vlkernels"]
    part = {"gradient": "gradient of q"}.get(wrong, "output")
    assert f"wrong does not run here: it computes something else: its {part} is off by" in capsys.readouterr().out


@pytest.mark.parametrize("batches", (1, 2))
@pytest.mark.parametrize("name", ("full", "prefix_lm", "causal", "ragged causal"))
def test_padded_sdpa_serves_every_table_and_any_lengths(name, batches):
    lengths = [[4, 3]] * 4 if name == "causal" else [[4, 3], [0, 6], [9, 2], [1, 1]]
    mask = {"full": None, "prefix_lm": vk.SegmentMask.prefix_lm()}.get(name, vk.SegmentMask.causal(2))
    layout = vk.SegmentLayout(lengths)
    q, k, v = torch.randn(3, layout.num_tokens, 2, 8).unbind()
    call, inputs = peers.rival(partial(peers.padded, batches)).prepare(q=q, k=k, v=v, layout=layout, mask=mask)
    assert len(call()) == len(inputs) / 3 == batches


def test_the_work_of_a_table_is_its_visible_pairs():
    draw = random.Random(0)
    for _ in range(40):
        segments, others = draw.randint(1, 3), draw.randint(1, 3)
        layout = vk.SegmentLayout([[draw.randint(0, 9) for _ in range(segments)] for _ in range(4)])
        keys = vk.SegmentLayout([[draw.randint(0, 9) for _ in range(others)] for _ in range(4)])
        mask = vk.SegmentMask([[draw.choice(tuple(CODES)) for _ in range(others)] for _ in range(segments)])
        assert benchmarks.visible_pairs(layout, keys, mask) == int(mask.dense(layout, keys).sum())
        own = vk.SegmentMask.causal(segments)
        assert benchmarks.visible_pairs(layout, None, own) == int(own.dense(layout).sum())
    qkv = torch.randn(6, 3, 2, 8, dtype=torch.bfloat16)
    cost = benchmarks.cost(vk.SegmentLayout([[2], [4]]), qkv)
    assert cost.forward_flops == 4 * 20 * 2 * 8 and cost.backward_flops == 10 * 20 * 2 * 8
    assert cost.forward_bytes == 4 * 6 * 2 * 8 * 2 and cost.backward_bytes == 2 * cost.forward_bytes


@pytest.mark.parametrize("share", (0.25, 0.5, 0.75))
@pytest.mark.parametrize("samples, longest", ((32, 128), (16, 256), (8, 20)))
def test_padding_is_the_share_that_the_name_says(share, samples, longest):
    lengths = [n for (n,) in benchmarks.lengths_with_padding(samples, longest, share)]
    assert len(lengths) == samples and min(lengths) >= 1 and max(lengths) == longest
    assert 1 - sum(lengths) / (samples * longest) == share
    assert len(set(lengths)) > samples / 3


def test_rows_on_the_cpu_are_for_the_cpu():
    rows = run.benchmarks_of(PACKED, "cpu")
    assert len([name for name in rows if "padding" in name]) == 3
    assert not set(rows) & set(run.benchmarks_of(PACKED, "cuda")) and not run.benchmarks_of(CROSS, "cpu")
    arguments = rows["32 x 1..128, 50% padding, H12 K64"].make(InputMaker(torch.float32))
    layout = arguments["layout"]
    assert layout.num_tokens * 2 == layout.num_samples * layout.max_seqlen
