"""vk.attention, impl="triton", interpreted with the tiles of sm_90: the contract, random tables, rows of nobody, bits."""

import dataclasses
import hashlib

import pytest
import torch

import vlkernels as vk
from tests.ops import test_attention as shared
from tests.ops.test_contract import RawCalls
from vlkernels.core import dispatch, triton_runtime
from vlkernels.ops.attention import reference, spec
from vlkernels.ops.attention.gpu import kernels as triton_kernels
from vlkernels.ops.attention.gpu import launches, tile_sizes, variants
from vlkernels.testing import contract
from vlkernels.testing.error_rule import assert_close

SPECS = {s.name: dataclasses.replace(s, deterministic=False) for s in spec.SPECS}  # programs take turns: two runs prove nothing
CASES = {(s.name, case.name): case for s in spec.SPECS for case in s.cases if "bias" not in case.name}  # those: test_attention_bias
HALF_CASES = ("cross", "dropout_negatives", "grouped_heads", "longer_than_a_tile")  # short samples have other kernels
CALLS = [(*names, torch.float32) for names in CASES] + [
    ("attention", name, dtype) for name in HALF_CASES for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("op, name, dtype", CALLS)
def test_contract(op, name, dtype):
    contract.verify(SPECS[op], CASES[op, name], dtype, "triton")


def test_the_raw_ops_keep_their_schemas():
    recorder = RawCalls()
    with recorder:
        qkv = torch.randn(6, 3, 1, 16, requires_grad=True)
        vk.attention_qkvpacked(qkv, layout=vk.SegmentLayout([[4, 1]], capacity=6), impl="triton").sum().backward()
    assert len(recorder.calls) == 2
    for op, arguments in recorder.calls.items():
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("seed", range(8))
def test_random_tables(seed):
    tensors, options = shared.draw_call(seed)
    tensors = {name: t.bfloat16().double() for name, t in tensors.items() if name != "bias"}
    truth = shared.results(reference.attention, tensors, options, torch.float64)
    eager = shared.results(reference.attention, tensors, options, torch.float32)
    for name, tensor in shared.results(vk.attention, tensors, options, torch.float32, impl="triton").items():
        assert_close(name, tensor, eager[name], truth[name])


@pytest.mark.parametrize("width, heads", ((16, 1), (80, 1), (96, 2)))
def test_heads_that_fill_no_power_of_two(width, heads):
    qkv = torch.randn(23, 3, heads, width, requires_grad=True)
    outs = [vk.attention_qkvpacked(qkv, layout=vk.SegmentLayout([[9, 14]]), impl=impl) for impl in ("triton", "reference")]
    torch.testing.assert_close(*outs)
    cotangent = torch.randn_like(outs[0])
    torch.testing.assert_close(*(torch.autograd.grad(out, qkv, cotangent) for out in outs))


def test_rows_that_a_graph_laid_out_in_another_way_are_read_all_the_same():
    layout, place = vk.SegmentLayout([[9, 14]]), torch.randint(0, 30, (23, 2), dtype=torch.int32)
    tables = [torch.randn(8, 2), torch.randn(8, 2)]
    bias = vk.RelativeBias(place, tables, num_buckets=8, max_distance=20)
    cotangent = torch.randn(23, 2, 16)

    def call(*rows, place):
        table, full = bias.distance_bias, vk.SegmentMask.full(2).table("cpu")
        inputs = (
            list(rows), layout.starts, layout.lengths, None, None, None, full, None, table, place, None, layout.sample_ids, None,
            0.25, 0.0, 0, 23, bias.radius,
        )  # fmt: skip
        out, lse = launches.forward(*inputs)
        return [out, lse, *launches.backward(cotangent, None, out, lse, True, *inputs)]

    rows = [torch.randn(23, 2, 16) for _ in range(3)]
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in rows]
    assert all(torch.equal(a, b) for a, b in zip(call(*rows, place=place), call(*turned, place=place.T.contiguous().T)))


def test_nan_stays_in_its_own_sample():
    shared.test_nan_stays_in_its_own_sample("triton")


def test_gradients_of_the_lse_of_nothing_stay_there():
    shared.test_gradients_that_arrive_at_the_lse_of_nothing_stay_there("triton", False)


def test_padded_layouts_write_every_row():
    layout, qkv = vk.SegmentLayout.padded([3, 0, 5], 5), torch.randn(15, 3, 1, 16, requires_grad=True)
    with contract.poisoned_memory():
        out, lse = vk.attention_qkvpacked(qkv, layout=layout, return_lse=True, impl="triton")
        (grad,) = torch.autograd.grad(out.sum() + lse[:, :3].sum(), qkv)
    outside = layout.token_sample() < 0
    assert (out[outside] == 0).all() and (lse[:, outside] == -torch.inf).all() and (grad[outside] == 0).all()
    torch.testing.assert_close(out, vk.attention_qkvpacked(qkv, layout=layout, impl="reference"))


def test_layouts_drawn_on_the_device_and_streams_without_rows():
    whole = vk.SegmentLayout([[3, 4], [6, 1], [2, 9]])
    drawn, nothing = whole.take(torch.tensor([2, 0])), vk.SegmentLayout([[0], [0]])
    q = torch.randn(1, drawn.num_tokens, 16).transpose(0, 1).requires_grad_()  # heads outside, as some projections give them
    outs = [vk.attention(q, q, q, layout=drawn, mask=vk.SegmentMask.prefix_lm(), impl=impl) for impl in ("triton", "reference")]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), q) for out in outs))
    k = torch.randn(0, 1, 16, requires_grad=True)
    out = vk.attention(q, k, k, layout=drawn, kv_layout=nothing, mask=vk.SegmentMask([["full"]] * 2), impl="triton")
    grads = torch.autograd.grad(out.sum(), (q, k))
    assert not out.any() and not grads[0].any() and grads[1].shape == k.shape


def test_packing_order_changes_no_bit():
    lengths, qkv, cotangent = [[70, 9], [5, 3]], torch.randn(87, 3, 1, 16), torch.randn(87, 1, 16)

    def call(order):
        rows = torch.cat([torch.arange(79), torch.arange(79, 87)][:: 1 if order == (0, 1) else -1])
        layout = vk.SegmentLayout([lengths[b] for b in order], sample_ids=[40 + b for b in order])
        x = qkv[rows].requires_grad_()
        options = {"mask": vk.SegmentMask.prefix_lm(), "dropout_p": 0.2, "rng": vk.Rng(3), "return_lse": True}
        out, lse = vk.attention_qkvpacked(x, layout=layout, **options, impl="triton")
        back = rows.argsort()
        return out[back], lse[:, back], torch.autograd.grad(out, x, cotangent[rows])[0][back]

    assert all(torch.equal(a, b) for a, b in zip(call((0, 1)), call((1, 0))))


@pytest.mark.parametrize(
    "change, message",
    (
        ({"qkv": torch.randn(4, 3, 1, 8).double()}, "it computes in float32, the inputs are float64"),
        ({"qkv": torch.randn(4, 3, 1, 257)}, "it serves heads up to K = 256, got 257"),
        ({"softmax_scale": -1.0}, "it needs a positive softmax_scale, got -1.0"),
    ),
)
def test_what_the_kernels_do_not_serve_is_refused_with_the_reason(change, message):
    arguments = {"qkv": torch.randn(4, 3, 1, 8), "layout": vk.SegmentLayout([[4]])} | change
    with pytest.raises(ValueError, match=f'cannot run with impl="triton": {message}'):
        vk.attention_qkvpacked(**arguments, impl="triton")
    with dispatch.recorded() as served:
        vk.attention_qkvpacked(**arguments)
    assert served[0][1] != "triton", "auto never interprets"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dropout_p", (0.0, 0.1))
def test_what_is_interpreted_is_what_a_hopper_card_runs(monkeypatch, dtype, dropout_p):
    launched = []
    monkeypatch.setattr(triton_runtime.Launch, "run", lambda launch: launched.append(launch))
    qkv = torch.randn(129, 3, 1, 64, dtype=dtype, requires_grad=True)
    options = {"layout": vk.SegmentLayout([[4, 125]]), "dropout_p": dropout_p, "rng": vk.Rng(0)}
    vk.attention_qkvpacked(qkv, **options, impl="triton").sum().backward()
    launched = [launch for launch in launched if "QUERIES" in launch.constants]  # without those of the work lists
    kernels = "forward", "query_gradient", "key_gradient"
    assert len(launched) == len(kernels)
    for launch, kernel in zip(launched, kernels):
        wanted = tile_sizes.tile_sizes(kernel, dtype, 64, dropout_p > 0, 90)
        assert launch.kernel is getattr(triton_kernels, f"{kernel}_kernel")
        assert (launch.constants["QUERIES"], launch.constants["KEYS"], launch.warps, launch.stages) == wanted


def digest(launches):
    """A hash of what is launched: kernels, grids, constants, warps and stages."""
    said = [(x.kernel.fn.__name__, x.grid, sorted(x.constants.items()), x.warps, x.stages) for x in launches]
    return hashlib.sha256(repr(said).encode()).hexdigest()


CALLS_OF_EVERY_PATH = ((torch.float32, 40), (torch.bfloat16, 12), (torch.bfloat16, 128), (torch.float16, 130))


@pytest.mark.parametrize("dtype, longest", CALLS_OF_EVERY_PATH)
@pytest.mark.parametrize("dropout_p", (0.0, 0.1))
def test_launches_and_grids_are_those_of_sm_90(monkeypatch, dtype, longest, dropout_p):
    launched, run = [], triton_runtime.Launch.run
    monkeypatch.setattr(triton_runtime.Launch, "run", lambda launch: (launched.append(launch), run(launch)))
    layout = vk.SegmentLayout([[longest - 1, 1], [2, 4]])
    qkv = torch.randn(layout.num_tokens, 3, variants.HEADS, 64, dtype=dtype, requires_grad=True)
    options = {"layout": layout, "dropout_p": dropout_p, "rng": vk.Rng(0)}
    vk.attention_qkvpacked(qkv, **options, impl="triton").sum().backward()
    interpreted = [launch for launch in launched if "HEAD_DIM" in launch.constants]  # without those of the work lists
    call = dtype, 64, dropout_p > 0, 90, layout
    wanted = variants.resident_launches(*call) or variants.launches(*call)
    assert digest(interpreted) == digest(wanted.values())
