"""Padded attention against its formula: every kind of padding, on both of its ways to the kernels."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

import vlkernels as vk
from vlkernels.core.layout import MAX_SEGMENTS
from vlkernels.core.spec import Case
from vlkernels.integrations import padded
from vlkernels.integrations.padded import Padding, attend
from vlkernels.testing import sync_lint

B, H, L, K = 3, 4, 40, 8


def mask_of(kind: str) -> Tensor:
    real = torch.ones(B, L, dtype=torch.bool)
    if kind == "right":
        real[0, 20:], real[1, 39:] = False, False
    elif kind == "left":
        real[0, :20], real[1, :1] = False, False
    elif kind == "holes":
        real[0, 3:9], real[1, 0], real[1, 8], real[2, 30:35], real[2, 39] = False, False, False, False, False
    elif kind == "many-holes":
        real[0, ::2], real[1, 1::3] = False, False
    elif kind == "empty-sample":
        real[1] = False
    return real


def formula(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = scale * q @ k.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    queries, keys = scores.shape[2:]
    visible = torch.ones(len(q), 1, queries, keys, dtype=torch.bool)
    if real is not None:
        visible = visible & real[:, None, None, :]
        if causal:  # a query in the padding is nobody
            visible = visible & real[:, None, -queries:, None]
    if causal:
        visible = visible & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    blind = ~visible.any(-1, keepdim=True)
    probabilities = scores.masked_fill(~visible & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0.0)
    return (probabilities @ v).transpose(1, 2)


def inputs(queries: int, keys: int, bias: str | None, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    shapes = [(B, H, queries, K), (B, H // 2, keys, K), (B, H // 2, keys, K)]
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    if bias is None:
        return [*tensors, None]
    shape = {"shared": (1, H, queries, keys), "full": (B, H, queries, keys)}[bias]
    return [*tensors, torch.randn(shape, dtype=dtype, requires_grad=True)]


KINDS = ("right", "left", "holes", "many-holes", "empty-sample")


@pytest.fixture(params=["host", "device"])
def lengths_known_on(request, monkeypatch):
    """On a device real rows are gathered wherever they stand; here that way is walked on the CPU."""
    if request.param == "device":
        monkeypatch.setattr(padded, "_find_rows", padded.Packed)
    return request.param


@pytest.mark.parametrize("bias", [None, "shared", "full"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [L, 7, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind, queries, causal, bias, lengths_known_on):
    real = mask_of(kind)
    tensors = inputs(queries, L, bias)
    out = attend(*tensors[:3], padding=Padding(real), causal=causal, bias=tensors[3], softmax_scale=0.3)
    expected = formula(*tensors[:3], real, causal, tensors[3], 0.3)
    assert out.shape == (B, queries, H, K)
    read = real[:, -queries:, None, None] if causal and bias is not None else torch.ones(())
    torch.testing.assert_close(out * read, expected * read)
    weights = torch.randn_like(expected) * read
    wanted = [t for t in tensors if t is not None]
    grads = (torch.autograd.grad((x * weights).sum(), wanted) for x in (out, expected))
    for found, true in zip(*grads):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [L, 7])
def test_without_padding(queries, causal):
    tensors = inputs(queries, L, "shared")
    out = attend(*tensors[:3], causal=causal, bias=tensors[3])
    torch.testing.assert_close(out, formula(*tensors[:3], None, causal, tensors[3], K**-0.5))


@pytest.mark.parametrize(("kind", "gathered", "hidden"), [
    ("right", 0, 0), ("empty-sample", 0, 0), ("left", 4, 0), ("holes", 4, 0), ("many-holes", 4, 1)
])  # fmt: skip
def test_which_way_is_taken(kind, gathered, hidden, monkeypatch):
    """Rows at the front are read in place, others gathered; a bias takes the padding in where that has too many runs."""
    calls = []
    own = Padding.hide
    monkeypatch.setattr(padded, "take_rows", lambda *a: calls.append("gather") or vk.take_rows(*a))
    monkeypatch.setattr(Padding, "hide", lambda *a: calls.append("hide") or own(*a))
    for bias in (None, "shared"):
        q, k, v, added = inputs(L, L, bias)
        attend(q, k, v, padding=Padding(mask_of(kind)), causal=True, bias=added)
    assert (calls.count("gather"), calls.count("hide")) == (gathered, hidden)
    assert (padded._run_lengths(mask_of(kind)).shape[1] > MAX_SEGMENTS) == bool(hidden)


def test_runs_are_lengths_of_hidden_and_real_keys_in_turn():
    real = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert padded._run_lengths(real).tolist() == [[0, 2, 2, 1], [1, 4, 0, 0], [5, 0, 0, 0], [0, 5, 0, 0]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["right", "left", "many-holes"])
def test_padding_is_not_read(kind, causal):
    """Whatever stands in the padding, NaN too, changes nothing."""
    real = mask_of(kind)
    q, k, v, _ = inputs(L, L, None)
    spoilt = [x.detach().masked_fill(~real[:, None, :, None], torch.nan) for x in (k, v)]
    clean = attend(q, k, v, padding=Padding(real), causal=causal)
    torch.testing.assert_close(attend(q, *spoilt, padding=Padding(real), causal=causal), clean)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [L, 7])
def test_nothing_waits_for_the_device(queries, causal, monkeypatch):
    # Nothing without data may outlive this test.
    monkeypatch.setattr(padded, "CAUSAL", vk.SegmentMask.causal())
    monkeypatch.setattr(padded, "whole_layout", padded._new_whole_layout)

    def call(q, k, v, real):
        return attend(q, k, v, padding=Padding(real), causal=causal)

    q, k, v, _ = inputs(queries, L, None, torch.float32)
    sync_lint.lint(call, Case("padded", lambda make: {"q": q, "k": k, "v": v, "real": mask_of("holes")}))


def test_dropout_follows_the_generator():
    tensors = inputs(L, L, None, torch.float32)[:3]
    with torch.random.fork_rng():
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(attend(*tensors, padding=Padding(mask_of("right")), dropout_p=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_autocast_decides_the_dtype_as_for_sdpa():
    q, k, v, _ = inputs(L, L, None, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(q, k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16


def test_what_is_made_from_a_mask_is_shared_and_dies_with_it():
    made = []
    mask = torch.ones(2, 5, dtype=torch.bool)

    def make():
        made.append(1)
        return Padding(mask_for_closure[0])

    mask_for_closure = [mask]
    first = padded.kept(mask, "padding", make)
    assert padded.kept(mask, "padding", make) is first and len(made) == 1
    mask[0, 3:] = False
    assert padded.kept(mask, "padding", make) is not first and len(made) == 2
    before = len(padded._made)
    mask_for_closure.clear()
    del mask, first
    gc.collect()
    assert len(padded._made) == before - 1


@pytest.mark.parametrize("bias", [None, "shared"])
@pytest.mark.parametrize("kind", ["right", "many-holes"])
def test_a_mask_first_met_in_inference_mode_serves_training(kind, bias):
    mask, (q, k, v, added) = mask_of(kind), inputs(L, L, bias)
    with torch.inference_mode():
        attend(q, k, v, padding=padded.kept(mask, "padding", lambda: Padding(mask)), bias=added)
    attend(q, k, v, padding=padded.kept(mask, "padding", lambda: Padding(mask)), bias=added).sum().backward()
    with torch.inference_mode():
        own = mask_of(kind)
        attend(q, k, v, padding=padded.kept(own, "padding", lambda: Padding(own)), bias=added)
