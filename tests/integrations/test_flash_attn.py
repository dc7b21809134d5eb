"""flash-attn's signatures and semantics."""

from __future__ import annotations

import gc
import inspect

import numpy as np
import pytest
import torch
from torch import Tensor

import vlkernels as vk
from vlkernels.integrations import padded
from vlkernels.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func

QUERIES, KEYS = (5, 3, 0, 9), (7, 3, 2, 4)


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(kv_heads: int = 2) -> list[Tensor]:
    shapes = [(sum(QUERIES), 4, 8), (sum(KEYS), kv_heads, 8), (sum(KEYS), kv_heads, 8)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def formula(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One sample; the last query is beside the last key."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        before = torch.ones(scores.shape[1:]).tril(scores.shape[2] - scores.shape[1]).bool()
        scores = scores.masked_fill(~before, -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return torch.einsum("hqk,khd->qhd", weights, v), scores.logsumexp(-1)


def all_samples(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    parts = zip(q.split(QUERIES), k.split(KEYS), v.split(KEYS))
    outs, lses = zip(*(formula(*part, causal, scale) for part in parts))
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen(causal, scale):
    tensors = packed()
    out, lse, probabilities = flash_attn_varlen_func(
        *tensors, bounds(QUERIES), bounds(KEYS), max(QUERIES), max(KEYS), 0.0, scale, causal, return_attn_probs=True
    )
    expected, expected_lse = all_samples(*tensors, causal, 8**-0.5 if scale is None else scale)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert probabilities is None
    weights = torch.randn_like(out)
    grads = (torch.autograd.grad((x * weights).sum(), tensors) for x in (out, expected))
    for found, true in zip(*grads):
        torch.testing.assert_close(found, true)


def test_a_window_that_ends_at_the_query_is_causal():
    lengths = bounds(QUERIES), bounds(KEYS), max(QUERIES), max(KEYS)
    tensors = packed()
    causal = flash_attn_varlen_func(*tensors, *lengths, causal=True)
    assert torch.equal(flash_attn_varlen_func(*tensors, *lengths, window_size=(-1, 0)), causal)


@pytest.mark.parametrize("causal", [False, True])
def test_qkv_in_one_tensor(causal):
    qkv = torch.randn(sum(QUERIES), 3, 4, 8, dtype=torch.float64, requires_grad=True)
    lengths = bounds(QUERIES)
    out = flash_attn_varlen_qkvpacked_func(qkv, lengths, max(QUERIES), causal=causal)
    q, k, v = qkv.unbind(1)
    expected = flash_attn_varlen_func(q, k, v, lengths, lengths, max(QUERIES), max(QUERIES), causal=causal)
    torch.testing.assert_close(out, expected)
    (found,), (true,) = (torch.autograd.grad(x.square().sum(), qkv) for x in (out, expected))
    torch.testing.assert_close(found, true)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [6, 9])
def test_batched(keys, causal):
    q, k, v = (torch.randn(2, n, h, 8, dtype=torch.float64) for n, h in ((6, 4), (keys, 2), (keys, 2)))
    out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    for b in range(2):
        expected, expected_lse = formula(q[b], k[b], v[b], causal, 8**-0.5)
        torch.testing.assert_close(out[b], expected)
        torch.testing.assert_close(lse[b], expected_lse)


def test_dropout_drops():
    tensors = packed()
    lengths = bounds(QUERIES), bounds(KEYS), max(QUERIES), max(KEYS)
    dropped, whole = (flash_attn_varlen_func(*tensors, *lengths, dropout_p=p) for p in (0.5, 0.0))
    assert not torch.equal(dropped, whole)


def test_signatures_are_flash_attns():
    names = list(inspect.signature(flash_attn_varlen_func).parameters)
    assert names == [
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale", "causal",
        "window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs", "block_table",
    ]  # fmt: skip
    shared = names[7:-1]
    assert list(inspect.signature(flash_attn_varlen_qkvpacked_func).parameters) == ["qkv", "cu_seqlens", "max_seqlen", *shared]
    assert list(inspect.signature(flash_attn_func).parameters) == ["q", "k", "v", *shared]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"window_size": (128, 0)}, r"window_size must be \(-1, -1\), or \(-1, 0\) for causal, got \(128, 0\)"),
        ({"window_size": None}, "window_size must be .* got None"),
        ({"softcap": 30.0}, "softcap must be 0, got 30.0"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes must be None"),
        ({"block_table": torch.ones(4)}, "block_table must be None"),
    ],
)
def test_what_is_not_served_is_refused(more, message):
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(*packed(), bounds(QUERIES), bounds(KEYS), max(QUERIES), max(KEYS), **more)


def test_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="max_seqlen must be at least the longest sample = 9, got 4"):
        flash_attn_varlen_func(*packed(), bounds(QUERIES), bounds(KEYS), 4, max(KEYS))
    with pytest.raises(ValueError, match="cu_seqlens_k must be a Tensor, got a list"):
        flash_attn_varlen_func(*packed(), bounds(QUERIES), bounds(KEYS).tolist(), max(QUERIES), max(KEYS))
    with pytest.raises(ValueError, match=r"q must be \[B, L, H, K\]"):
        flash_attn_func(*packed())


def test_layers_share_one_layout_which_dies_with_its_lengths(monkeypatch):
    made = []
    own = vk.SegmentLayout.from_cu_seqlens.__func__
    counted = classmethod(lambda cls, *a, **k: made.append(1) or own(cls, *a, **k))
    monkeypatch.setattr(vk.SegmentLayout, "from_cu_seqlens", counted)
    q, lengths = packed()[0], bounds(QUERIES)
    for _ in range(3):
        flash_attn_varlen_func(q, q, q, lengths, lengths, max(QUERIES), max(QUERIES))
    assert made == [1]
    before = len(padded._made)
    del lengths
    gc.collect()
    assert len(padded._made) == before - 1


def test_lengths_that_numpy_rewrites():
    memory = np.array([0, 5, 9], dtype=np.int32)
    q, lengths = torch.randn(9, 2, 8), torch.from_numpy(memory)
    before = flash_attn_varlen_func(q, q, q, lengths, lengths, 5, 5)
    memory[1] = 4
    after = flash_attn_varlen_func(q, q, q, lengths, lengths, 5, 5)
    assert not torch.equal(before, after)
    assert torch.equal(after, flash_attn_varlen_func(q, q, q, lengths.clone(), lengths.clone(), 5, 5))
