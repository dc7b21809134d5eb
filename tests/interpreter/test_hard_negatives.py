"""The draw of hard negatives, interpreted as sm_90 runs it: the contract, any number of pairs, spans, mutants."""

import pytest
import torch

import vlkernels as vk
from tests.mutants import load_mutant
from vlkernels.core.spec import Case
from vlkernels.ops.hard_negatives import spec
from vlkernels.ops.hard_negatives.gpu import kernels, launches
from vlkernels.testing import contract

SPEC = spec.SPECS[0]
CASES = {case.name: case for case in SPEC.cases}
CASES["several blocks"] = Case(
    "several blocks", lambda fill: spec._features(fill, 140, 40, labels=fill.integers(0, 3, (140,)), stream=2)
)


CALLS = [(name, dtype) for name in CASES for dtype in launches.DTYPES if dtype == torch.float32 or name == "pairs"]


@pytest.mark.parametrize("name, dtype", CALLS)
def test_contract(name, dtype):
    contract.verify(SPEC, CASES[name], dtype, "triton")


@pytest.mark.parametrize("pairs, width", [(1, 8), (2, 100), (65, 8), (150, 24)])
def test_any_number_of_pairs_in_spans(monkeypatch, pairs, width):
    monkeypatch.setattr(launches, "MOST_BLOCKS", 100)
    images, texts = torch.randn(2, pairs, width).unbind()
    options = {"labels": torch.randint(0, 9, (pairs,)), "rng": vk.Rng(pairs)}
    drawn = [vk.hard_negatives(images, texts, 0.7, **options, impl=impl) for impl in ("triton", "reference")]
    assert all(torch.equal(mine, true) for mine, true in zip(*drawn))


def test_no_span_begins_within_a_tile(monkeypatch):
    """Where rows are no multiple of 16 bytes, how a span begins would depend on N and make another kernel."""
    monkeypatch.setattr(launches, "MOST_BLOCKS", 100)
    firsts, draw_span = [], launches._draw_span
    monkeypatch.setattr(launches, "_draw_span", lambda span, *rest: firsts.append(span.first) or draw_span(span, *rest))
    features = torch.randn(150, 3)
    vk.hard_negatives(features, features, 1.0, rng=vk.Rng(0), impl="triton")
    assert firsts == [0, 64, 128] * 2


def test_a_threshold_past_all_shares_takes_the_last_admissible_key():
    """Rounding may leave the shares of a block below a draw near 1."""
    features = torch.zeros(70, 8)
    labels = torch.arange(70).clamp_max(66)
    drawn = launches.draw(features, features, torch.tensor(1.0), 0, labels, torch.full((70,), 2.0))
    assert drawn.tolist() == [69] * 66 + [65] * 4


MUTANTS = {  # name: (old, new, the case that must notice)
    "the query itself": ("& (key[None, :] != first + row[:, None])", "", "peaked"),
    "equal labels": ("allowed & (own[:, None] != others[None, :])", "allowed", "labels"),
    "labels of other queries": ("labels + first + row", "labels + row * 0", "labels"),
    "the scale": ("* (tl.load(scale).to(tl.float32) * triton_math.LOG2_E)", "* triton_math.LOG2_E", "several blocks"),
    "the scale inside a block": ("products * tl.load(scale).to(tl.float32) -", "products -", "pairs"),
    "the block's weight": ("(highest + tl.log2(total))", "highest", "several blocks"),
    "weights of another block": ("* blocks + j", "* blocks + blocks - 1 - j", "several blocks"),
    "the first key of all": ("block * BLOCK + tl.minimum", "tl.minimum", "several blocks"),
    "columns past the first": ("products += tl.sum(values", "products = tl.sum(values", "wide"),
}
CASES["wide"] = Case("wide", lambda fill: spec._features(fill, 60, 72))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_contract_red(name, tmp_path, monkeypatch):
    old, new, case = MUTANTS[name]
    mutant = load_mutant(kernels, old, new, tmp_path)
    monkeypatch.setattr(launches, "_kernels", lambda: mutant)
    with pytest.raises(AssertionError):
        contract.verify(SPEC, CASES[case], torch.float32, "triton")
        pytest.fail("the contract stayed green", pytrace=False)
