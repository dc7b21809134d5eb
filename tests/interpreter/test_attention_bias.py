"""vk.attention with a bias, impl="triton", interpreted: the contract, gradients shared in every way, rows of nobody, bits."""

import dataclasses

import pytest
import torch

import vlkernels as vk
from tests.ops import test_attention as shared
from vlkernels.core import triton_runtime
from vlkernels.ops.attention import reference, spec
from vlkernels.ops.attention.gpu import launches, tile_sizes
from vlkernels.testing import contract
from vlkernels.testing.error_rule import assert_close

SPECS = {s.name: dataclasses.replace(s, deterministic=False) for s in spec.SPECS}
CASES = {(s.name, case.name): case for s in spec.SPECS for case in s.cases if "bias" in case.name}
HALF_CASES = ("bias", "shared_bias", "bias_by_place")
CALLS = [(*names, torch.float32) for names in CASES] + [
    ("attention", name, dtype) for name in HALF_CASES for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("op, name, dtype", CALLS)
def test_contract(op, name, dtype):
    contract.verify(SPECS[op], CASES[op, name], dtype, "triton")


SHARED_BY = {"nobody": (3, 4), "samples": (1, 4), "heads": (3, 1), "all": (1, 1)}


@pytest.mark.parametrize("by, cross", [(by, False) for by in SHARED_BY] + [("nobody", True), ("all", True)])
def test_a_bias_shared_in_every_way(by, cross, monkeypatch):
    monkeypatch.setattr(launches, "BUSY_PROGRAMS", 6)  # so few that samples are summed in several parts
    layout = keys = vk.SegmentLayout([[3, 30], [0, 5], [7, 2]], capacity=50)
    options = {"layout": layout, "mask": vk.SegmentMask.prefix_lm()}
    if cross:
        keys, table = vk.SegmentLayout([[9, 4], [36, 1]]), vk.SegmentMask([["causal", "full"], ["full", "none"]])
        options |= {"kv_layout": keys, "kv_index": torch.tensor([1, 1, 0]), "mask": table, "dropout_p": 0.2, "stream": 1}
    bias = torch.randn(*SHARED_BY[by], layout.max_seqlen + 1, keys.max_seqlen + 3)
    bias[torch.rand_like(bias) < 0.1] = -torch.inf
    q, k, v = (torch.randn(n, heads, 16) for n, heads in ((50, 4), (keys.num_tokens, 2), (keys.num_tokens, 2)))
    tensors = {name: t.bfloat16().double() for name, t in {"q": q, "k": k, "v": v, "bias": bias}.items()}
    truth = shared.results(reference.attention, tensors, options, torch.float64)
    eager = shared.results(reference.attention, tensors, options, torch.float32)
    for name, tensor in shared.results(vk.attention, tensors, options, torch.float32, impl="triton").items():
        assert_close(name, tensor, eager[name], truth[name])


def test_rows_that_a_bias_hides_and_rows_of_nobody():
    layout, qkv = vk.SegmentLayout.padded([3, 0, 5], 5), torch.randn(15, 3, 2, 16)
    qkv[layout.token_sample() < 0] = torch.nan
    bias = torch.zeros(3, 1, 5, 5).index_fill_(2, torch.tensor([1]), -torch.inf)
    place = torch.zeros(15, 1, dtype=torch.int32)
    table = torch.randn(8, 2, requires_grad=True)
    qkv, bias = qkv.requires_grad_(), bias.requires_grad_()
    with contract.poisoned_memory():
        out, lse = vk.attention_qkvpacked(qkv, layout=layout, bias=bias, return_lse=True, impl="triton")
        grads = torch.autograd.grad(out.sum(), (qkv, bias))
        relative = vk.RelativeBias(place, [table], num_buckets=8, max_distance=9)
        (table_grad,) = torch.autograd.grad(
            vk.attention_qkvpacked(qkv, layout=layout, bias=relative, impl="triton").sin().sum(), table
        )
    hidden = torch.zeros(15, dtype=torch.bool).index_fill_(0, torch.tensor([1, 11]), True) | (layout.token_sample() < 0)
    assert (out[hidden] == 0).all() and (lse[:, hidden] == -torch.inf).all() and (out[~hidden] != 0).all()
    assert all(grad.isfinite().all() for grad in grads) and (grads[0][hidden][:, 0] == 0).all()
    assert table_grad.isfinite().all()


@pytest.mark.parametrize("lengths, keys", (([[2], [1]], [[0], [0]]), ([[0], [0]], [[2], [1]]), ([[0], [0]], [[0], [0]])))
def test_without_queries_or_without_keys_a_shared_bias_has_the_gradient_zero(lengths, keys):
    layout, keys = vk.SegmentLayout(lengths, capacity=3), vk.SegmentLayout(keys)
    q, k = torch.randn(3, 1, 16, requires_grad=True), torch.randn(keys.num_tokens, 1, 16, requires_grad=True)
    table, plane = torch.randn(8, 1, requires_grad=True), torch.randn(1, 1, layout.max_seqlen, keys.max_seqlen, requires_grad=True)
    places = (torch.zeros(rows, 1, dtype=torch.int32) for rows in (3, keys.num_tokens))
    relative = vk.RelativeBias(next(places), [table], num_buckets=8, max_distance=9, kv_coordinates=next(places))
    for bias, wanted in ((relative, table), (plane, plane)):
        with contract.poisoned_memory():
            out = vk.attention(q, k, k, layout=layout, kv_layout=keys, bias=bias, impl="triton")
            grads = torch.autograd.grad(out.sum(), (q, k, wanted))
        assert not out.any() and not any(grad.any() for grad in grads)


def by_position(layout, table, max_distance=20):
    position = layout.token_position("sample")[:, None]
    return vk.RelativeBias(position, [table], num_buckets=table.shape[0], max_distance=max_distance)


def test_packing_order_changes_no_bit_of_anything():
    lengths, qkv, cotangent, table = [[40, 9], [5, 3]], torch.randn(57, 3, 1, 16), torch.randn(57, 1, 16), torch.randn(8, 1)
    planes = torch.randn(2, 1, 49, 49)

    def call(order):
        rows = torch.cat([torch.arange(49), torch.arange(49, 57)][:: 1 if order == (0, 1) else -1])
        layout, x = vk.SegmentLayout([lengths[b] for b in order]), qkv[rows].requires_grad_()
        found = []
        for wanted in (table.clone().requires_grad_(), planes[list(order)].requires_grad_()):
            bias = by_position(layout, wanted) if wanted.dim() == 2 else wanted
            out = vk.attention_qkvpacked(x, layout=layout, mask=vk.SegmentMask.prefix_lm(), bias=bias, impl="triton")
            grads = torch.autograd.grad(out, (x, wanted), cotangent[rows])
            own = grads[1] if wanted.dim() == 2 else grads[1][torch.tensor(order).argsort()]
            found += [out[rows.argsort()], grads[0][rows.argsort()], own]
        return found

    assert all(torch.equal(a, b) for a, b in zip(call((0, 1)), call((1, 0))))


@pytest.mark.parametrize("power", (-60, 0, 100))
def test_the_gradient_of_a_table_has_no_scale_of_its_own(power):
    layout, qkv, table = vk.SegmentLayout([[9], [14]]), torch.randn(23, 3, 2, 16), torch.randn(8, 2, requires_grad=True)
    out = vk.attention_qkvpacked(qkv, layout=layout, bias=by_position(layout, table), impl="triton")
    cotangent = torch.randn_like(out)
    (grad,), (scaled,) = (torch.autograd.grad(out, table, c, retain_graph=True) for c in (cotangent, cotangent * 2.0**power))
    assert torch.equal(scaled, grad * 2.0**power) and grad.any()
    (nothing,) = torch.autograd.grad(out, table, torch.zeros_like(out))
    assert not nothing.any()


def test_counts_hold_the_largest_gradient_there_is():
    """One query, two keys: the bound of a row's sum is met within a factor of four; and NaN comes back as NaN."""
    layout, keys, table = vk.SegmentLayout([[1]]), vk.SegmentLayout([[2]]), torch.zeros(8, 1, requires_grad=True)
    q, k, v = torch.zeros(1, 1, 1), torch.zeros(2, 1, 1), torch.tensor([1.0, -1.0]).view(2, 1, 1)
    places = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([[-30], [30]], dtype=torch.int32)
    bias = vk.RelativeBias(places[0], [table], num_buckets=8, max_distance=20, kv_coordinates=places[1])
    out = vk.attention(q, k, v, layout=layout, kv_layout=keys, bias=bias, impl="triton")
    (grad,) = torch.autograd.grad(out, table, torch.full_like(out, 1.9375), retain_graph=True)
    assert grad.flatten().tolist() == [0, 0, 0, 0.96875, 0, 0, 0, -0.96875]
    (grad,) = torch.autograd.grad(out, table, torch.full_like(out, torch.nan))
    assert grad[3].isnan() and grad[7].isnan()


KINDS = {  # name: (kernels of a step, coordinates)
    "own": (tile_sizes.KERNELS, 0),
    "shared": ((*tile_sizes.KERNELS, "shared_gradient"), 0),
    "by position": ((*tile_sizes.KERNELS, "distance_gradient"), 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_interpreted_is_what_a_hopper_card_runs(kind, monkeypatch):
    launched, (kernels, coordinates) = [], KINDS[kind]
    monkeypatch.setattr(triton_runtime.Launch, "run", lambda launch: launched.append(launch))
    layout, table = vk.SegmentLayout([[4], [5]]), torch.randn(8, 1, requires_grad=True)
    planes = torch.randn(2 if kind == "own" else 1, 1, 5, 5, requires_grad=True)
    bias = by_position(layout, table) if coordinates else planes
    qkv = torch.randn(9, 3, 1, 64, dtype=torch.bfloat16, requires_grad=True)
    vk.attention_qkvpacked(qkv, layout=layout, bias=bias, impl="triton").sum().backward()
    launched = [launch for launch in launched if "QUERIES" in launch.constants]  # without those of the work lists
    assert [launch.kernel.fn.__name__ for launch in launched] == [f"{kernel}_kernel" for kernel in kernels]
    for launch, kernel in zip(launched, kernels):
        wanted = tile_sizes.tile_sizes(kernel, torch.bfloat16, 64, False, 90, coordinates)
        assert (launch.constants["QUERIES"], launch.constants["KEYS"], launch.warps, launch.stages) == wanted
