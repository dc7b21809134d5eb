"""Short samples in slots, interpreted as sm_90 runs them: who serves, every table and slot, draws, NaN, bits, mutants."""

import dataclasses
import random

import pytest
import torch

import vlkernels as vk
from tests.mutants import load_mutant
from tests.ops import test_attention as shared
from vlkernels.core import triton_runtime
from vlkernels.core.mask import CODES
from vlkernels.core.spec import Case
from vlkernels.ops.attention import reference, spec
from vlkernels.ops.attention.gpu import resident, resident_kernels
from vlkernels.testing import contract
from vlkernels.testing.error_rule import assert_close

SPECS = {s.name: dataclasses.replace(s, deterministic=False) for s in spec.SPECS}  # programs take turns: two runs prove nothing
CASES = {(s.name, case.name): case for s in spec.SPECS for case in s.cases}
SHORT = [("attention", name) for name in ("full", "prefix_lm", "causal", "holes", "dropout")]
SHORT += [("attention_qkvpacked", name) for name in ("fixed_length", "full", "prefix_lm")]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that ran."""
    kernels, run = [], triton_runtime.Launch.run

    def record(launch):
        kernels.append(launch.kernel)
        run(launch)

    monkeypatch.setattr(triton_runtime.Launch, "run", record)
    return kernels


def resident_alone(launched):
    return launched == [resident_kernels.forward_kernel, resident_kernels.backward_kernel]


@pytest.mark.parametrize("op, name", SHORT)
@pytest.mark.parametrize("dtype", HALF)
def test_contract(launched, op, name, dtype):
    contract.verify(SPECS[op], CASES[op, name], dtype, "triton")
    assert resident_alone(launched)


def draw_call(rows, width, dropout_p, seed):
    """Random samples for slots of ``rows``: any table of up to 16 segments, empty and one-token segments and samples, capacity."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    segments, samples = draw.choice((1, 2, 3, 16)), 640 // rows + 3
    lengths = [[draw.choice((0, 1, draw.randint(0, rows // segments))) for _ in range(segments)] for _ in range(samples)]
    lengths[1] = [0] * (segments - 1) + [rows]
    table = [[draw.choice(("none", "full")) for _ in range(segments)] for _ in range(segments)]
    for segment in range(segments):
        table[segment][segment] = draw.choice(tuple(CODES))
    layout = vk.SegmentLayout(lengths, capacity=sum(map(sum, lengths)) + 2 * rows, sample_ids=range(5, 5 + samples))
    shape = layout.num_tokens, draw.choice((1, 2)), width
    tensors = {name: torch.randn(shape, generator=numbers).bfloat16().double() for name in "qkv"}
    return tensors, {"layout": layout, "mask": vk.SegmentMask(table), "dropout_p": dropout_p, "stream": 3}


@pytest.mark.parametrize("dtype, dropout_p", [*zip(HALF, (0.0, 0.3))])
@pytest.mark.parametrize("rows, width", ((16, 64), (16, 128), (32, 24), (64, 80), (128, 16)))
def test_random_tables(launched, rows, width, dtype, dropout_p):
    tensors, options = draw_call(rows, width, dropout_p, seed=rows + width)
    truth = shared.results(reference.attention, tensors, options, torch.float64)
    eager = shared.results(reference.attention, tensors, options, dtype)
    with contract.poisoned_memory():
        actual = shared.results(vk.attention, tensors, options, dtype, impl="triton")
    for name, tensor in actual.items():
        assert_close(name, tensor, eager[name], truth[name])
    assert resident_alone(launched)


@pytest.mark.parametrize("longest", (16, 32, 64, 128))
def test_dropout_keeps_what_the_definition_keeps(longest):
    """With equal scores and one-hot values the output is the mask."""
    lengths = [[longest, 0], [3, longest - 5], [1, 0], [0, 2], [longest // 2, 1]]
    layout = vk.SegmentLayout(lengths, sample_ids=[9, 2, 4, 2**31 - 1, 0])
    k = torch.zeros(layout.num_tokens, 2, longest).half()
    position = layout.token_position("sample").long()
    v = torch.nn.functional.one_hot(position, longest).half()[:, None].expand_as(k)
    options = {"layout": layout, "mask": vk.SegmentMask.prefix_lm(), "dropout_p": 0.4, "rng": vk.Rng(7), "stream": 11}
    kept, wanted = (vk.attention(k, k, v, **options, impl=impl) != 0 for impl in ("triton", "reference"))
    assert torch.equal(kept, wanted) and not torch.equal(kept[:, 0], kept[:, 1])


@pytest.mark.parametrize("longest", (16, 64))
def test_nan_stays_in_its_own_sample(longest):
    layout = vk.SegmentLayout([[5], [3], [longest], [2]], capacity=longest + 20)
    clean = torch.randn(layout.num_tokens, 3, 2, 16).bfloat16()
    spoiled = clean.clone()
    nobodys = slice(longest + 10, None)
    spoiled[5:8] = spoiled[nobodys] = torch.nan
    found = []
    for values in (clean, spoiled):
        qkv = values.clone().requires_grad_()
        out = vk.attention_qkvpacked(qkv, layout=layout, impl="triton")
        found.append((out, torch.autograd.grad(out, qkv, torch.ones_like(out))[0]))
    elsewhere = torch.cat([torch.arange(5), torch.arange(8, layout.num_tokens)])
    assert all(torch.equal(a[elsewhere], b[elsewhere]) for a, b in zip(*found))
    assert not found[1][0][nobodys].any() and not found[1][1][nobodys].any()
    assert found[1][0][5:8].isnan().all()


@pytest.mark.parametrize("max_len, lengths", ((5, [3, 0, 5, 1, 4]), (90, [40, 0, 2])))
def test_padded_layouts_write_every_row(max_len, lengths):
    layout = vk.SegmentLayout.padded(lengths, max_len)
    qkv = torch.randn(layout.num_tokens, 3, 1, 16).half().requires_grad_()
    with contract.poisoned_memory():
        out, lse = vk.attention_qkvpacked(qkv, layout=layout, return_lse=True, impl="triton")
        (grad,) = torch.autograd.grad(out.sum() + lse[:, :3].sum(), qkv)
    outside = layout.token_sample() < 0
    assert (out[outside] == 0).all() and (lse[:, outside] == -torch.inf).all() and (grad[outside] == 0).all()
    torch.testing.assert_close(out, vk.attention_qkvpacked(qkv, layout=layout, impl="reference"), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("longest", (16, 40))
def test_packing_order_changes_no_bit(longest):
    draw = random.Random(longest)
    lengths = [[draw.randint(0, longest - 4), draw.randint(0, 4)] for _ in range(7)]
    whole = vk.SegmentLayout(lengths)
    qkv, cotangent = (torch.randn(whole.num_tokens, *shape).bfloat16() for shape in ((3, 2, 16), (2, 16)))

    def call(order):
        first, length = whole.starts[:, 0].tolist(), [sum(row) for row in lengths]
        rows = torch.cat([torch.arange(first[b], first[b] + length[b]) for b in order])
        layout = vk.SegmentLayout([lengths[b] for b in order], capacity=len(rows) + 3, sample_ids=[40 + b for b in order])
        x = torch.cat([qkv[rows], qkv[:3]]).requires_grad_()
        options = {"mask": vk.SegmentMask.prefix_lm(), "dropout_p": 0.2, "rng": vk.Rng(3), "return_lse": True}
        out, lse = vk.attention_qkvpacked(x, layout=layout, **options, impl="triton")
        (grad,) = torch.autograd.grad(out, x, torch.cat([cotangent[rows], cotangent[:3]]))
        back = rows.argsort()
        return out[back], lse[:, back], grad[back]

    order = list(range(7))
    expected = call(order)
    draw.shuffle(order)
    assert all(torch.equal(a, b) for a, b in zip(expected, call(order)))


def test_gradients_that_arrive_at_the_lse_of_nothing_stay_there():
    layout = vk.SegmentLayout([[2, 3], [4, 0]])
    qkv = torch.randn(9, 3, 1, 16).half().requires_grad_()
    mask = vk.SegmentMask([["none", "none"], ["full", "causal"]])
    out, lse = vk.attention_qkvpacked(qkv, layout=layout, mask=mask, return_lse=True, impl="triton")
    (grad,) = torch.autograd.grad((out, lse), qkv, (torch.ones_like(out), torch.full_like(lse, 3.0)))
    assert grad.isfinite().all() and not grad[5:].any() and not grad[:2, 0].any() and grad[2:5].any()


MUTANTS = {  # name: (old, new, the case that must notice)
    "place: < for <=": ("place[None, :] <= place", "place[None, :] < place", "causal"),
    "place turned": ("place[None, :] <= place[:, None]", "place[:, None] <= place[None, :]", "causal"),
    "causal taken for full": ("codes == FULL", "codes != NONE", "causal"),
    "full taken for causal": ("(codes == FULL)", "(codes == NONE - 1)", "full"),
    "a segment's bit": ("1 << segment", "2 << segment", "holes"),
    "columns of the table": ("table + segment * segments + column", "table + segment + column * segments", "holes"),
    "a segment's last row": ("(rows < _per_row(end, GROUP))", "(rows < _per_row(end, GROUP) - 1)", "full"),
    "a segment's first row": ("(rows >= _per_row(begin, GROUP))", "(rows > _per_row(begin, GROUP))", "full"),
    "the last segment left out": ("range(segments)", "range(segments - 1)", "holes"),
    "rows of the next sample": ("owned = rows < _per_row(end, GROUP)", "owned = rows <= _per_row(end, GROUP)", "many"),
    "samples of a program": ("sample = tile * GROUP", "sample = tile * (GROUP - 1)", "many"),
    "statistics of head 0": ("lse_base += head *", "lse_base += 0 *", "full"),
    "lse not in powers of two": ("lse * triton_math.LOG2_E", "lse", "full"),
    "sign of the gradient of lse": ("delta -=", "delta +=", "full"),
    "scale of dk": ("_product(_turned(ds), q) * softmax_scale", "_product(_turned(ds), q)", "full"),
    "scale of dq": ("_product(ds, k) * softmax_scale", "_product(ds, k)", "full"),
    "dk turned": ("_product(_turned(ds), q)", "_product(ds, q)", "full"),
    "scale of what is kept": ("dp * keep_scale", "dp", "dropout"),
    "scale of what is sent": ("p * keep_scale", "p", "dropout"),
    "draws of the first sample": ("tl.load(sample_ids + sample,", "tl.load(sample_ids + 0 * sample,", "dropout"),
    "draws by the row of the group": ("tl.arange(0, GROUP * SLOT) % SLOT", "tl.arange(0, GROUP * SLOT)", "dropout"),
    "nothing dropped from dp": ("dp = tl.where(kept,", "dp = tl.where(kept == kept,", "dropout"),
    "row stride": ("_load(k_base + head * k_head, first, k_stride", "_load(k_base + head * k_head, first, v_stride", "strided"),
    "head stride": ("_load(q_base + head * q_head", "_load(q_base + head * k_head", "strided"),
    "rows past the last sample": ("tl.minimum(first + share, tokens)", "tl.minimum(first + share, past)", "dropout"),
    "a share of them": ("first = past + tile * share", "first = past + tile * GROUP * share", "many"),
    "the gap behind a sample": ("tl.where(follows, next_start, end)", "end", "padded"),
    "the gap of one of a group": ("most = tl.max(stop - first, 0)", "most = tl.min(stop - first, 0)", "padded"),
    "the gap's second slot": ("range(0, most, SLOT)", "range(0, 1, SLOT)", "padded"),
}  # fmt: skip


def _strided(fill):
    wide = [fill.normal(23, 2, width, grad=False) for width in (12, 16, 20)]
    q, k, v = (x[..., :8].requires_grad_() for x in wide)
    return {"q": q, "k": k, "v": v, "layout": fill.layout([[9, 7], [0, 7]])}


def _many(fill):
    lengths = [[n % 4, n % 3] for n in range(11)]
    layout = fill.layout(lengths, capacity=sum(map(sum, lengths)) + 40)
    return {"qkv": fill.normal(layout.num_tokens, 3, 1, 16), "layout": layout, "return_lse": True}


def _padded(fill):
    layout = vk.SegmentLayout.padded([3, 16, 7], 40)
    return {"qkv": fill.normal(layout.num_tokens, 3, 1, 16), "layout": layout, "return_lse": True}


OWN_CASES = {
    "strided": ("attention", Case("strided", _strided)),
    "many": ("attention_qkvpacked", Case("many", _many)),
    "padded": ("attention_qkvpacked", Case("padded", _padded)),
}
MUTANT_CASES = {name: ("attention", CASES["attention", name]) for name in ("full", "causal", "holes", "dropout")} | OWN_CASES


@pytest.mark.parametrize("name", OWN_CASES)
def test_own_cases(launched, name):
    op, case = MUTANT_CASES[name]
    contract.verify(SPECS[op], case, torch.float16, "triton")
    assert resident_alone(launched)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_contract_red(name, tmp_path, monkeypatch):
    old, new, case = MUTANTS[name]
    mutant = load_mutant(resident_kernels, old, new, tmp_path)
    monkeypatch.setattr(resident, "_kernels", lambda: mutant)
    op, case = MUTANT_CASES[case]
    with pytest.raises(AssertionError):
        contract.verify(SPECS[op], case, torch.float16, "triton")
        pytest.fail("the contract stayed green", pytrace=False)
