"""impl="flash": tables as calls of a variable-length kernel; a library in plain PyTorch stands in for it."""

import inspect
import random
from functools import partial

import pytest
import torch

import vlkernels as vk
from tests.ops.varlen_standin import Standin, rounding
from vlkernels.core.mask import CODES
from vlkernels.core.spec import Case
from vlkernels.ops.attention import functional, reference
from vlkernels.ops.attention.flash import calls as flash, libraries
from vlkernels.testing import sync_lint
from vlkernels.testing.arguments import map_tensors
from vlkernels.testing.error_rule import assert_close

CELLS = tuple(CODES)


def draw_layout(draw, samples, segments):
    lengths = [[draw.choice((0, 1, draw.randint(0, 9))) for _ in range(segments)] for _ in range(samples)]
    kind = draw.choice(("exact", "capacity", "padded", "taken", "device"))
    if kind == "padded" and segments == 1:
        return vk.SegmentLayout.padded([row[0] for row in lengths], 11)
    if kind == "device" and segments == 1:
        exact = vk.SegmentLayout(lengths)
        return vk.SegmentLayout.from_cu_seqlens(exact.cu_seqlens, max_seqlen=9, num_tokens=exact.num_tokens + 3)
    if kind == "taken":
        return vk.SegmentLayout(lengths).take(torch.tensor([draw.randrange(samples) for _ in range(samples)]))
    return vk.SegmentLayout(lengths, capacity=samples * segments * 9 if kind == "capacity" else None)


def draw_call(seed):
    """A random call: any layout, cross-attention, shared keys, grouped heads; tables biased to those that can be expressed."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    samples, segments = draw.randint(1, 5), draw.randint(1, 3)
    layout = keys = draw_layout(draw, samples, segments)
    kv_layout = kv_index = None
    if draw.random() < 0.4:
        keys = kv_layout = draw_layout(draw, draw.choice((samples, 3)), draw.randint(1, 2))
    if keys.num_samples != samples or draw.random() < 0.2:
        kv_index = torch.tensor([draw.randrange(keys.num_samples) for _ in range(samples)], dtype=torch.int32)
    usual = [None, vk.SegmentMask.full(segments), vk.SegmentMask.causal(segments)]
    usual += [vk.SegmentMask.block_diagonal([1] * segments)]
    usual += [vk.SegmentMask.prefix_lm()] if segments == 2 else []
    table = [
        [draw.choice(CELLS if kv_layout or q == k else CELLS[:2]) for k in range(keys.num_segments)] for q in range(segments)
    ]
    mask = draw.choice(usual) if kv_layout is None and draw.random() < 0.5 else vk.SegmentMask(table)
    heads, folded = draw.choice((1, 2)), draw.choice((1, 3))

    def normal(rows, heads):
        return torch.randn(rows, heads, 8, generator=numbers, dtype=torch.float64).bfloat16().double()

    tensors = {
        "q": normal(layout.num_tokens, heads * folded),
        "k": normal(keys.num_tokens, heads),
        "v": normal(keys.num_tokens, heads),
    }
    return tensors, {"layout": layout, "mask": mask, "kv_layout": kv_layout, "kv_index": kv_index}


def results(function, tensors, options, dtype, **more):
    inputs = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    out, lse = function(**inputs, **options, return_lse=True, **more)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    grads = torch.autograd.grad(out, list(inputs.values()), ramp, allow_unused=True)
    named = {f"d{name}": torch.zeros_like(t) if g is None else g for (name, t), g in zip(inputs.items(), grads)}
    return {"out": out, "lse": lse.detach()} | named


def table_of(options):
    layout, keys = options["layout"], options["kv_layout"] or options["layout"]
    return flash.full_table(layout, keys) if options["mask"] is None else options["mask"].codes


def expressible(options):
    try:
        flash.groups(table_of(options), options["kv_layout"] is None and options["kv_index"] is None)
    except flash.Inexpressible:
        return False
    return True


EXPRESSIBLE = [seed for seed in range(120) if expressible(draw_call(seed)[1])]


def test_both_kinds_of_tables_are_drawn():
    assert 60 < len(EXPRESSIBLE) < 110


@pytest.mark.parametrize("seed", EXPRESSIBLE)
def test_random_tables_obey_the_error_rule(seed):
    tensors, options = draw_call(seed)
    standin = Standin()
    truth = results(reference.attention, tensors, options, torch.float64)
    exact = results(flash.attention, tensors, options, torch.float64, library=standin.library)
    for name, tensor in exact.items():
        exactly = 1e-5 if options["kv_index"] is not None and name in ("dk", "dv") else 1e-11  # those are added in float32
        torch.testing.assert_close(tensor, truth[name], rtol=exactly, atol=exactly)
    eager = results(reference.attention, tensors, options, torch.bfloat16)
    actual = results(flash.attention, tensors, options, torch.bfloat16, library=rounding(standin))
    for name, tensor in actual.items():
        assert_close(name, tensor, eager[name], truth[name])


MASKS = {
    "full": (vk.SegmentMask.full(2), [((0, 1), 0, 1, False)]),
    "causal": (vk.SegmentMask.causal(3), [((0, 1, 2), 0, 2, True)]),
    "prefix-LM": (vk.SegmentMask.prefix_lm(), [((0,), 0, 0, False), ((1,), 0, 1, True)]),
    "two towers": (vk.SegmentMask.block_diagonal([1, 2]), [((0,), 0, 0, False), ((1, 2), 1, 2, False)]),
    "image, text, image": (
        vk.SegmentMask([["full", "full", "none"], ["full", "full", "none"], ["none", "none", "causal"]]),
        [((0, 1), 0, 1, False), ((2,), 2, 2, True)],
    ),
    "neighbours, each causal": (
        vk.SegmentMask([["causal", "none"], ["none", "causal"]]),
        [((0,), 0, 0, True), ((1,), 1, 1, True)],
    ),
    "outer segments alike": (
        vk.SegmentMask([["full"] * 3, ["none", "full", "none"], ["full"] * 3]),
        [((0, 2), 0, 2, False), ((1,), 1, 1, False)],
    ),
    "a break in a causal sequence": (
        vk.SegmentMask([["causal", "none", "none"], ["none", "full", "none"], ["full", "full", "causal"]]),
        [((0,), 0, 0, True), ((1,), 1, 1, False), ((2,), 0, 2, True)],
    ),
    "one blind segment": (vk.SegmentMask([["none", "none"], ["full", "full"]]), [((1,), 0, 1, False)]),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_table_is_as_few_calls_as_it_can_be(name):
    mask, expected = MASKS[name]
    assert [tuple(group) for group in flash.groups(mask.codes, aligned=True)] == expected


def test_a_whole_stream_is_read_where_it_lies():
    layout, standin = vk.SegmentLayout([[3, 4], [2, 2]]), Standin()
    qkv = torch.randn(11, 3, 2, 8, requires_grad=True)
    q, k, v = qkv.unbind(1)
    out = flash.attention(q, k, v, layout=layout, library=standin.library)
    ((seen_q, seen_k, _, _),) = standin.calls
    assert seen_q.data_ptr() == q.data_ptr() and seen_k.data_ptr() == k.data_ptr()
    assert out.grad_fn.name() == "_VarlenBackward", "something was computed after the library"
    flash.attention(q, k, v, layout=layout, mask=vk.SegmentMask.prefix_lm(), library=standin.library)
    image, text = standin.calls[1:]
    assert [x.shape[0] for x in image[:2]] == [5, 5] and [x.shape[0] for x in text[:2]] == [6, 11]
    assert text[1].data_ptr() == k.data_ptr()


def test_calls_are_shared_by_the_layers_of_a_model():
    layout, mask = vk.SegmentLayout([[3, 4], [2, 2]]), vk.SegmentMask.prefix_lm()
    q, k, v = torch.randn(3, 11, 2, 8)
    flash.attention(q, k, v, layout=layout, mask=mask, library=Standin().library)
    first = flash._calls(layout, vk.SegmentMask.prefix_lm(), None, None)
    assert first is flash._calls(layout, mask, None, None)
    assert first is not flash._calls(layout, None, None, None)
    assert flash._calls(layout, None, layout, None) is not flash._calls(layout, None, None, None), "another stream"
    layout.lengths.copy_(torch.tensor([[4, 3], [2, 2]]))
    assert first is not flash._calls(layout, mask, None, None)


REFUSED = {
    "disjoint": (
        [["full", "none", "full"], ["full"] * 3, ["full"] * 3],
        True,
        "it serves segments that see one run of keys, query segment 0 sees key segments [0, 2]",
    ),
    "causal first": (
        [["full", "full"], ["causal", "full"]],
        False,
        "it serves a causal segment as the last one seen, query segment 1 sees more after one",
    ),
    "full and causal across": (
        [["full", "causal"]],
        False,
        "in another stream query segment 0 may see full segments or one causal segment, not both",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_tables_are_refused_in_one_line(name):
    rows, aligned, message = REFUSED[name]
    assert flash.refusal(facts(table=vk.SegmentMask(rows).codes, aligned=aligned), Standin().library) == message


def facts(**changed):
    usual = {
        "dtype": torch.bfloat16, "head_dim": 64, "softmax_scale": 0.125, "bias": None, "dropout": False, "lse_gradient": False,
        "deterministic": False, "shared_keys": False, "grouped": False, "table": ((1,),), "aligned": True,
    }  # fmt: skip
    return {**usual, **changed}


@pytest.mark.parametrize(
    "changed, message",
    (
        ({"dtype": torch.float32}, "it computes in bfloat16 or float16, the inputs are float32"),
        ({"head_dim": 264}, "it serves heads of a multiple of 8 up to K = 256, got 264"),
        ({"head_dim": 20}, "it serves heads of a multiple of 8 up to K = 256, got 20"),
        ({"bias": "tensor"}, "it takes no bias"),
        ({"dropout": True}, "its dropout cannot draw the masks of vk.Rng"),
        ({"lse_gradient": True}, "its lse has no gradient"),
        ({"softmax_scale": -1.0}, "it needs a positive softmax_scale, got -1.0"),
        (
            {"deterministic": True, "shared_keys": True},
            "gradients of keys that several samples read add up in any order: pass deterministic=False",
        ),
        ({}, None),
        ({"deterministic": True}, None),
    ),
)
def test_what_no_library_can_is_refused(changed, message):
    assert flash.refusal(facts(**changed), Standin().library) == message


def test_what_this_library_cannot_is_refused():
    plain = libraries.Library("old varlen_attn", None, grouped_heads=False)
    message = "old varlen_attn takes as many heads of k as of q in this version"
    assert flash.refusal(facts(grouped=True), plain) == message and flash.refusal(facts(), plain) is None
    library = libraries.torch_varlen()
    reason = flash.refusal(facts(deterministic=True), library)
    assert reason.endswith("under torch.use_deterministic_algorithms(True) only: pass deterministic=False")
    torch.use_deterministic_algorithms(True)
    try:
        assert flash.refusal(facts(deterministic=True), library) is None
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_second_derivative():
    layout = vk.SegmentLayout([[4]])
    q, k, v = torch.randn(3, 4, 2, 8, requires_grad=True).unbind()
    out = flash.attention(q, k, v, layout=layout, library=Standin().library)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match='cannot differentiate twice.*impl="reference"'):
        grad.sum().backward()


def test_a_compiled_call_is_one_graph():
    def attend(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, deterministic, lse):
        return q * scale + (k.sum(0) + v.sum(0)), None

    library = libraries.Library("traceable", attend)
    layout, mask = vk.SegmentLayout([[3, 4], [2, 2]]), vk.SegmentMask.prefix_lm()
    inputs = [torch.randn(11, 2, 8, requires_grad=True) for _ in range(3)]
    call = partial(flash.attention, layout=layout, mask=mask, library=library)
    for function in (call, torch.compile(lambda *qkv: call(*qkv), backend="aot_eager", fullgraph=True)):
        out = function(*inputs)
        given = out.detach(), *torch.autograd.grad(out.square().sum(), inputs)
        if function is call:
            expected = given
    torch.testing.assert_close(given, expected)


def test_an_empty_batch_and_empty_streams():
    for lengths in (torch.zeros(0, 2, dtype=torch.int64), [[0, 0]]):
        layout = vk.SegmentLayout(lengths, capacity=3)
        inputs = [torch.randn(3, 2, 8, requires_grad=True) for _ in range(3)]
        out, lse = flash.attention(*inputs, layout=layout, return_lse=True, library=Standin().library)
        assert (out == 0).all() and (lse == -torch.inf).all()
        assert (torch.autograd.grad(out.sum(), inputs[0])[0] == 0).all()


class Recorded:
    """A function with another one's signature that keeps how it was called."""

    def __init__(self, like, returns):
        self.__signature__, self.returns, self.bound = inspect.signature(like), returns, []

    def __call__(self, *given, **named):
        self.bound.append(self.__signature__.bind(*given, **named).arguments)
        return self.returns


BOUNDS = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32), 4, 4


@pytest.mark.parametrize("lse", (False, True))
def test_our_calls_fit_the_installed_varlen_attn(lse):
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    recorded = Recorded(varlen_attn, ("out", "lse") if lse else "out")
    attend = libraries.torch_attend(recorded, AuxRequest)
    q, k, v = torch.randn(4, 4, 8), *torch.randn(2, 4, 2, 8)
    assert attend(q, k, v, *BOUNDS, True, 0.5, False, lse) == ("out", "lse" if lse else None)
    attend(q, q, q, *BOUNDS, False, 0.5, False, lse)
    causal, full = recorded.bound
    assert causal["window_size"] == (-1, 0) and causal["enable_gqa"] is True and causal["scale"] == 0.5
    assert full["window_size"] == (-1, -1) and "enable_gqa" not in full


# The arguments these libraries take, in their order.
def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
): ...  # fmt: skip


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
): ...  # fmt: skip


def flash_attn_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
    seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, aux_tensors=None, return_lse=False,
): ...  # fmt: skip


@pytest.mark.parametrize("function", (flash_attn_2, flash_attn_3, flash_attn_4))
@pytest.mark.parametrize("lse", (False, True))
def test_our_calls_fit_flash_attn(function, lse):
    recorded = Recorded(function, ("out", "lse", "more"))
    attend = libraries.dao_attend(recorded)
    q, k, v = torch.randn(3, 4, 2, 8)
    assert attend(q, k, v, *BOUNDS, True, 0.5, True, lse) == ("out", "lse" if lse else None)
    (bound,) = recorded.bound
    assert bound["cu_seqlens_q"] is BOUNDS[0] and bound["cu_seqlens_k"] is BOUNDS[1] and bound["max_seqlen_k"] == 4
    assert bound["causal"] is True and bound["softmax_scale"] == 0.5 and bound["deterministic"] is True
    assert bound.get("return_attn_probs", bound.get("return_lse", False)) is lse


@pytest.mark.parametrize("name", MASKS)
def test_no_hidden_sync_with_the_installed_varlen_attn(name):
    mask = MASKS[name][0]

    def make(fill):
        layout = fill.layout([[3] * mask.num_query_segments] * 2, capacity=40)
        q, k, v = (fill.normal(40, 2, 16) for _ in range(3))
        return {"q": q, "k": k, "v": v, "layout": layout, "mask": mask}

    function = partial(flash.attention, library=libraries.torch_varlen())
    sync_lint.lint(function, Case(name, make), torch.bfloat16)


def test_it_is_offered_on_request_only():
    names = [i.name for i in functional.IMPLEMENTATIONS]
    assert names[-2:] == ["flash", "reference"]
    offered = functional.IMPLEMENTATIONS[-2]
    assert "cuda" in offered.on_request and offered.devices == ("cuda",)
    layout, (q, k, v) = vk.SegmentLayout([[4]]), torch.randn(3, 4, 2, 8).unbind()
    with pytest.raises(ValueError, match='attention cannot run with impl="flash": it runs on cuda, the inputs are on cpu'):
        vk.attention(q, k, v, layout=layout, impl="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("seed", EXPRESSIBLE)
def test_random_tables_on_the_card(seed, dtype):
    tensors, options = (map_tensors(x, lambda t: t.cuda()) for x in draw_call(seed))
    truth = results(reference.attention, tensors, options, torch.float64)
    eager = results(reference.attention, tensors, options, dtype)
    inputs = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    out = vk.attention(**inputs, **options, deterministic=False, impl="flash")
    ramp = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device="cuda").view(out.shape).to(dtype)
    grads = torch.autograd.grad(out, list(inputs.values()), ramp, allow_unused=True)
    assert_close("out", out, eager["out"], truth["out"])
    for (name, tensor), grad in zip(inputs.items(), grads):
        given = torch.zeros_like(tensor) if grad is None else grad
        assert_close(f"d{name}", given, eager[f"d{name}"], truth[f"d{name}"])
