"""Whole steps: all variants compute the same, none is timed before that is shown, and the shares of a step are its own."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import provenance, train_step
from benchmarks.plain_transformer import TiedHead
from benchmarks.plain_uniter import bert
from benchmarks.steps import where
from benchmarks.steps.layoutlm import Distances, bucket
from benchmarks.steps.shapes import systems
from benchmarks.steps.system import HUGGING_FACE, PACKED, PADDED, spread
from vlkernels.ops.attention.bias import Buckets

TINY = {system.name: system for system in systems("tiny")}
PEERS = [(name, peer) for name in TINY for peer in (PADDED, HUGGING_FACE) if (name, peer) != ("ALBEF-base", HUGGING_FACE)]


def samples_of(system, count=5):
    random = np.random.default_rng(3)
    return [system.sample(lengths, random) for lengths in system.lengths(count, random).tolist()]


@pytest.mark.parametrize(("name", "peer"), PEERS)
def test_a_peer_computes_what_ours_does(name, peer):
    """Losses, and the norm of all gradients: weights that only have other names have the same."""
    system = TINY[name]
    torch.manual_seed(0)
    ours = system.model().eval()
    theirs, samples = system.peer(peer, ours).eval(), samples_of(system)
    batch = system.packed(samples)
    loss, expected = ours(batch), theirs(system.padded(samples), **system.agreeing(ours, batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    norms = [gradient_norm(model, value) for model, value in ((ours, loss), (theirs, expected))]
    torch.testing.assert_close(*norms, rtol=1e-3, atol=0)


def gradient_norm(model, loss):
    """Without that of the tables of biases, which transformers does not train."""
    loss.backward()
    tables = ("transformer.distances", "transformer.rel_pos", "tables")
    trained = [p.grad for name, p in model.named_parameters() if p.grad is not None and not name.startswith(tables)]
    return torch.stack([gradient.norm() for gradient in trained]).norm()


@pytest.mark.parametrize("own", [Distances(32, 128), Distances(64, 256)])
def test_buckets_of_the_padded_peer(own):
    distance = torch.arange(-700, 701)
    expected = Buckets(own.count, own.max_distance, True).of(distance)
    assert torch.equal(bucket(distance, own.count, own.max_distance), expected.long())


@pytest.mark.parametrize("name", TINY)
def test_a_row_says_all_of_a_step(name, tmp_path, capsys):
    assert train_step.main(["--device", "cpu", "--size", "tiny", "--system", name, "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cpu-*/train_step.jsonl")
    row = json.loads(path.read_text())
    assert not provenance.lacking(row, on_card=False) and row["benchmark"] == f"{name} step"
    variants = {f"{variant}, {kind}" for kind, variants in train_step.TIMED.items() for variant in variants}
    if name == "ALBEF-base":
        variants -= {f"{HUGGING_FACE}, random"}
        assert row["absent"] == {HUGGING_FACE: "transformers has no ALBEF"}
    for figure in ("seconds", "samples_per_s", "tokens_per_s", "mfu"):
        assert row[figure].keys() == variants
    assert row["packed_times_as_fast"].keys() == {variant for variant in variants if not variant.startswith(PACKED)}
    for shares in row["breakdown"].values():
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
        assert all(shares[part] > 0 for part in ("data", "optimizer", "attention", "linear maps", where.LOSSES, "embeddings"))
    assert row["padded_by_true"]["random"] > row["padded_by_true"]["bucketed"] >= 1
    assert row["peak_bytes"][PADDED] > row["peak_bytes"][PACKED] > 0
    assert "MFU" in capsys.readouterr().out


def test_what_differs_is_not_timed(tmp_path, capsys, monkeypatch):
    system = TINY["CLIP ViT-B/32"]
    make = system.peer

    def spoiled(name, ours):
        peer = make(name, ours)
        if name == PADDED:
            nn.init.normal_(peer.text_tower.blocks[0].feed_forward.norm.bias, std=0.1)
        return peer

    monkeypatch.setattr(system, "peer", spoiled)
    monkeypatch.setattr(train_step, "systems", lambda _: [system])
    monkeypatch.setattr(train_step, "measure", lambda *_: pytest.fail("timed"))
    assert train_step.main(["--device", "cpu", "--results", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert told.startswith(f"{system.name}: the variants differ, not timed: packed loss") and not list(tmp_path.iterdir())


def test_every_case_of_a_card_runs_without_one(capsys):
    assert train_step.main(["--device", "cuda", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert told.count("runs on tensors without values") == 11
    for begin in ("UNITER-base, 12 of 12", "LayoutLMv2-base, 12 of 12", "CLIP ViT-B/32, 12 and 12", "ALBEF-base, 12, 6 and 6"):
        assert begin in told


@pytest.mark.parametrize("name", TINY)
def test_operations_are_those_of_the_padded_model_without_padding(name):
    """Within what the counter knows: the whole forward of equal samples, whatever its last layer need not compute."""
    system = TINY[name]
    ours = system.model().eval()
    lengths, random = system.lengths(1, np.random.default_rng(0)).tolist()[0], np.random.default_rng(1)
    samples = [system.sample(lengths, random) for _ in range(4)]
    batch = system.packed(samples)
    plain, padded = system.peer(PADDED, ours).eval(), system.padded(samples)
    options = system.agreeing(ours, batch)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain(padded, **options)
    causal = 0 if name != "CLIP ViT-B/32" else 2 * 2 * 32 * 4 * lengths[0] ** 2  # counted without the mask
    assert 3 * (counter.get_total_flops() - causal) == pytest.approx(system.flops(batch), rel=2e-3)


def test_shares_follow_the_work():
    head = TiedHead(bert(64, 1, 4), 4000)
    inner, matrix, x = nn.Linear(64, 64), nn.Parameter(torch.randn(4000, 64)), torch.randn(512, 64)

    def in_the_head():
        nn.functional.cross_entropy(head(inner(x), matrix), torch.zeros(512, dtype=torch.long)).backward()

    shares, _ = where.take(in_the_head, head, "cpu")
    assert shares[where.LOSSES] > 0.7 and shares["linear maps"] > 0

    wide = nn.Linear(1024, 1024)
    shares, _ = where.take(lambda: wide(torch.randn(512, 1024)).sum().backward(), wide, "cpu")
    assert shares["linear maps"] > 0.5 and shares[where.LOSSES] == 0


def test_peak_counts_what_is_alive_together():
    def one_after_another():
        for _ in range(3):
            torch.empty(2**20)

    def together():
        return [torch.empty(2**20) for _ in range(3)]

    peaks = [where.take(step, nn.Identity(), "cpu")[1] for step in (one_after_another, together)]
    assert peaks == [pytest.approx(2**22, rel=0.01), pytest.approx(3 * 2**22, rel=0.01)]


def test_figures():
    class Counted:
        def flops(self, batch):
            return 40.0 * batch

        def tokens(self, batch):
            return 10 * batch, batch

        def padded_tokens(self, batch):
            return 15 * batch

    def took(*seconds):
        return [SimpleNamespace(seconds=value) for value in seconds]

    batches = {"random": [train_step.Both([], 1, 1), train_step.Both([], 3, 3)]}
    readings = {f"{PACKED}, random": took(1.0, 1.0), f"{PADDED}, random": took(2.0, 4.0)}
    found = train_step.figures(Counted(), batches, readings, matmul=100.0)
    assert found["samples_per_s"] == {f"{PACKED}, random": 2.0, f"{PADDED}, random": 4 / 6}
    assert found["tokens_per_s"][f"{PACKED}, random"] == 20 and found["mfu"][f"{PACKED}, random"] == 0.8
    assert found["packed_times_as_fast"] == {f"{PADDED}, random": 3.0} and found["padded_by_true"] == {"random": 1.5}


def test_batches_at_even_quantiles():
    lengths = torch.arange(12).repeat_interleave(2).view(12, 2)
    batches = list(torch.arange(12).view(6, 2).flip(0))
    assert [index.tolist() for index in spread(batches, lengths, 3)] == [[2, 3], [6, 7], [10, 11]]
