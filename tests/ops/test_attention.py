"""Attention beyond its contract: every table, blind rows, shared keys, packed gradients, keyed dropout, compile."""

import random

import pytest
import torch
import torch.nn.functional as F

import vlkernels as vk
from vlkernels.core import dispatch, native, random as generator
from vlkernels.core.mask import CODES
from vlkernels.ops.attention import reference
from vlkernels.ops.attention.cpu.tile_kernels import STEP_SCORES
from vlkernels.ops.attention.cpu.tiles import visible_blocks
from vlkernels.testing.error_rule import assert_close

CELLS = tuple(CODES)
compiled = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))


def draw_lengths(draw, samples, segments, longest):
    return [[draw.choice((0, 1, draw.randint(0, longest))) for _ in range(segments)] for _ in range(samples)]


def draw_call(seed):
    """The arguments of a random call in float64: any table, cross-attention, grouped heads, shared keys, bias, dropout."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    samples, segments, longest = draw.randint(1, 6), draw.randint(1, 3), draw.choice((3, 9, 40))
    layout = vk.SegmentLayout(draw_lengths(draw, samples, segments, longest), capacity=samples * segments * longest)
    keys, kv_layout, kv_index = layout, None, None
    if draw.random() < 0.5:
        sources = draw.choice((samples, draw.randint(1, 4)))
        keys = kv_layout = vk.SegmentLayout(draw_lengths(draw, sources, draw.randint(1, 3), longest))
    if keys.num_samples != samples or draw.random() < 0.3:
        kv_index = torch.tensor([draw.randrange(keys.num_samples) for _ in range(samples)], dtype=torch.int32)
    table = [
        [draw.choice(CELLS if kv_layout or q == k else CELLS[:2]) for k in range(keys.num_segments)] for q in range(segments)
    ]
    kv_heads, folded, width = draw.choice((1, 2)), draw.choice((1, 1, 3)), draw.choice((4, 7))

    def normal(*shape):
        return torch.randn(shape, generator=numbers, dtype=torch.float64)

    arguments = {
        "q": normal(layout.num_tokens, kv_heads * folded, width),
        "k": normal(keys.num_tokens, kv_heads, width),
        "v": normal(keys.num_tokens, kv_heads, width),
    }
    if draw.random() < 0.3:
        shape = draw.choice((1, samples)), draw.choice((1, kv_heads * folded)), layout.max_seqlen + 1, keys.max_seqlen
        arguments["bias"] = normal(*shape)
        arguments["bias"][arguments["bias"] > 1] = -torch.inf
    options = {
        "layout": layout,
        "mask": draw.choice((None, vk.SegmentMask(table), vk.SegmentMask(table))),
        "kv_layout": kv_layout,
        "kv_index": kv_index,
        "dropout_p": draw.choice((0.0, 0.0, 0.3)),
        "stream": 3,
    }
    return arguments, options


def results(function, tensors, options, dtype, **more):
    """Output, lse and all gradients along fixed cotangents that weigh every finite entry."""
    inputs = {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}
    out, lse = function(**inputs, **options, rng=vk.Rng(5), return_lse=True, **more)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    total = (out * ramp).sum() + lse.masked_fill(lse.isinf(), 0).cos().sum().to(dtype)
    grads = torch.autograd.grad(total, list(inputs.values()))
    return {"out": out, "lse": lse} | {f"d{name}": g for name, g in zip(inputs, grads)}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("seed", range(40))
def test_random_tables_obey_the_error_rule(seed, dtype):
    tensors, options = draw_call(seed)
    tensors = {name: t.bfloat16().double() for name, t in tensors.items()}
    truth = results(reference.attention, tensors, options, torch.float64)
    eager = results(reference.attention, tensors, options, dtype)
    for impl in ("torch", "cpp") if native.load() is None and "bias" not in tensors else ("torch",):
        actual = results(vk.attention, tensors, options, dtype, impl=impl)
        for name, tensor in actual.items():
            assert_close(f"{impl}: {name}", tensor, eager[name], truth[name])
    exact = results(vk.attention, tensors, options, torch.float64, impl="torch")
    for name, tensor in exact.items():
        torch.testing.assert_close(tensor, truth[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seed", range(30))
def test_blocks_cover_what_the_table_shows(seed):
    tensors, options = draw_call(seed)
    layout, keys = options["layout"], options["kv_layout"] or options["layout"]
    mask = options["mask"] or vk.SegmentMask([["full"] * keys.num_segments] * layout.num_segments)
    index = options["kv_index"] if options["kv_index"] is not None else torch.arange(layout.num_samples)
    seen = torch.zeros(layout.num_tokens, keys.num_tokens, dtype=torch.bool)
    for sample, source in enumerate(index.tolist()):
        lengths, key_lengths = layout.lengths[sample].tolist(), keys.lengths[source].tolist()
        for block in visible_blocks(lengths, key_lengths, mask.table("cpu").tolist()):
            row, column = int(layout.starts[sample, 0]) + block.query, int(keys.starts[source, 0]) + block.key
            window = seen[row : row + block.queries, column : column + block.keys]
            assert not window.any()
            window |= block.release() <= torch.arange(block.queries)[:, None]
            assert window.any(1).all(), "a query that sees nothing stands in a block"
    assert torch.equal(seen, mask.dense(layout, options["kv_layout"], options["kv_index"]))


@pytest.mark.parametrize("name", ("full", "prefix_lm", "causal"))
def test_agrees_with_sdpa_sample_by_sample(name):
    layout = vk.SegmentLayout([[6, 3], [2, 9], [4, 4]])
    mask = {"full": None, "prefix_lm": vk.SegmentMask.prefix_lm(), "causal": vk.SegmentMask.causal(2)}[name]
    q, k, v = torch.randn(3, layout.num_tokens, 2, 16, requires_grad=True).unbind()
    out = vk.attention(q, k, v, layout=layout, mask=mask)
    dense = (mask or vk.SegmentMask.full(2)).dense(layout)
    bounds = layout.cu_seqlens.tolist()
    expected = []
    for start, stop in zip(bounds, bounds[1:]):
        own = [x[start:stop].transpose(0, 1) for x in (q, k, v)]
        expected.append(F.scaled_dot_product_attention(*own, attn_mask=dense[start:stop, start:stop]).transpose(0, 1))
    torch.testing.assert_close(out, torch.cat(expected))
    cotangent = torch.randn_like(out)
    wanted = torch.autograd.grad(torch.cat(expected), (q, k, v), cotangent)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), cotangent), wanted)


@pytest.mark.parametrize("impl", ("torch", "reference", pytest.param("cpp", marks=compiled)))
def test_rows_that_see_nothing_are_zero_and_have_zero_gradients(impl):
    layout, keys = vk.SegmentLayout([[5], [3], [2]], capacity=12), vk.SegmentLayout([[2], [0], [3]])
    q = torch.randn(12, 2, 8, requires_grad=True)
    k, v = (torch.randn(5, 2, 8, requires_grad=True) for _ in range(2))
    bias = torch.zeros(3, 1, 5, 3) if impl != "cpp" else None
    inputs = q, k, v
    if bias is not None:
        bias[2, :, 1] = -torch.inf
        inputs = *inputs, bias.requires_grad_()
    causal = vk.SegmentMask([["causal"]])
    out, lse = vk.attention(q, k, v, layout=layout, kv_layout=keys, mask=causal, bias=bias, return_lse=True, impl=impl)
    blind = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 0, bias is not None, 1, 1]).bool()
    assert (out[blind] == 0).all() and (out[~blind] != 0).all()
    assert (lse[:, blind] == -torch.inf).all() and lse[:, ~blind].isfinite().all()
    grads = torch.autograd.grad((out.exp().sum(), lse), inputs, (torch.ones(()), torch.randn_like(lse)))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][blind] == 0).all() and (grads[0][~blind] != 0).any()


@pytest.mark.parametrize("impl", ("torch", pytest.param("cpp", marks=compiled)))
def test_nan_stays_in_its_own_sample(impl):
    layout = vk.SegmentLayout([[5], [3], [16]], capacity=30)
    clean = torch.randn(30, 3, 2, 8)
    spoiled = clean.clone()
    spoiled[5:8] = spoiled[24:] = torch.nan
    found = []
    for values in (clean, spoiled):
        qkv = values.clone().requires_grad_()
        out = vk.attention_qkvpacked(qkv, layout=layout, impl=impl)
        found.append((out, torch.autograd.grad(out, qkv, torch.ones_like(out))[0]))
    elsewhere = torch.cat([torch.arange(5), torch.arange(8, 24)])
    for a, b in zip(*found):
        torch.testing.assert_close(a[elsewhere], b[elsewhere])
    assert (found[1][0][24:] == 0).all() and (found[1][1][24:] == 0).all()
    assert found[1][0][5:8].isnan().all()


def test_packed_form_gives_one_gradient_and_reads_views_in_place():
    layout = vk.SegmentLayout([[4, 2], [0, 7]])
    qkv = torch.randn(13, 3, 2, 8, requires_grad=True)
    out = vk.attention_qkvpacked(qkv, layout=layout, mask=vk.SegmentMask.prefix_lm())
    (source,) = (node for node, _ in out.grad_fn.next_functions if node is not None)
    assert source.variable is qkv, "nothing may stand between the projection and the op"
    views = vk.attention(*qkv.unbind(1), layout=layout, mask=vk.SegmentMask.prefix_lm())
    copies = vk.attention(*(x.contiguous() for x in qkv.unbind(1)), layout=layout, mask=vk.SegmentMask.prefix_lm())
    cotangent = torch.randn_like(out)
    packed, split, copied = (torch.autograd.grad(x, qkv, cotangent)[0] for x in (out, views, copies))
    for a, b in ((out, views), (out, copies), (packed, split), (packed, copied)):
        torch.testing.assert_close(a, b)


@compiled
@pytest.mark.parametrize("level", native.CPU_ISA_LEVELS)
@pytest.mark.parametrize(("width", "spread"), ((5, 1), (32, 1), (32, 40), (72, 1)))
def test_every_instruction_set_gives_the_same_result(level, width, spread):
    layout = vk.SegmentLayout([[16, 5], [16, 15], [0, 1], [7, 33]])
    tensors = dict(zip("qkv", torch.randn(3, layout.num_tokens, 2, width, dtype=torch.float64)))
    tensors["q"] *= spread  # 40: most probabilities are near 0 or 0
    options = {"layout": layout, "mask": vk.SegmentMask.prefix_lm(), "dropout_p": 0.2, "stream": 1}
    truth = results(reference.attention, tensors, options, torch.float64)
    eager = results(reference.attention, tensors, options, torch.float32)
    native.limit_cpu_isa(level)
    try:
        actual = results(vk.attention, tensors, options, torch.float32, impl="cpp")
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])
    for name, tensor in actual.items():
        assert_close(name, tensor, eager[name], truth[name])


@compiled
@pytest.mark.parametrize("level", native.CPU_ISA_LEVELS)
def test_samples_of_several_steps_that_share_keys(level):
    layout, keys = vk.SegmentLayout([[600], [130], [3], [90]]), vk.SegmentLayout([[200], [9]])
    rows = (layout.num_tokens, 4), (keys.num_tokens, 2), (keys.num_tokens, 2)
    tensors = dict(zip("qkv", (torch.randn(*shape, 8, dtype=torch.float64) for shape in rows)))
    options = {"layout": layout, "kv_layout": keys, "kv_index": torch.tensor([0, 1, 1, 0]), "dropout_p": 0.2}
    truth = results(reference.attention, tensors, options, torch.float64)
    eager = results(reference.attention, tensors, options, torch.float32)
    native.limit_cpu_isa(level)
    try:
        actual = results(vk.attention, tensors, options, torch.float32, impl="cpp")
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])
    for name, tensor in actual.items():
        assert_close(name, tensor, eager[name], truth[name])


@compiled
def test_the_number_of_threads_changes_no_bit():
    layout, keys = vk.SegmentLayout([[n % 9 + 1, n % 5] for n in range(60)]), vk.SegmentLayout([[16]] * 11)
    rows = (layout.num_tokens, 4), (keys.num_tokens, 2), (keys.num_tokens, 2)
    tensors = dict(zip("qkv", (torch.randn(*shape, 16) for shape in rows)))
    options = {"layout": layout, "kv_layout": keys, "kv_index": torch.arange(60) * 7 % 11, "dropout_p": 0.1}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(vk.attention, tensors, options, torch.float32, impl="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in found)))


def test_shared_keys_sum_their_gradients():
    layout, keys = vk.SegmentLayout([[3], [1], [4], [2]]), vk.SegmentLayout([[5], [20]])
    index = torch.tensor([1, 0, 1, 1])
    q = torch.randn(10, 2, 8)
    k, v = (torch.randn(25, 2, 8, requires_grad=True) for _ in range(2))
    out = vk.attention(q, k, v, layout=layout, kv_layout=keys, kv_index=index)
    copied = [torch.cat([x[5:] if i else x[:5] for i in index.tolist()]) for x in (k, v)]
    expected = vk.attention(q, *copied, layout=layout, kv_layout=vk.SegmentLayout([[20], [5], [20], [20]]))
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, (k, v), cotangent), torch.autograd.grad(expected, (k, v), cotangent))


def test_padded_layout_attends_inside_padded_tensors():
    layout = vk.SegmentLayout.padded([3, 6, 1], 6)
    qkv = torch.randn(3, 6, 3, 2, 8)
    out = vk.attention_qkvpacked(qkv.flatten(0, 1), layout=layout).view(3, 6, 2, 8)
    visible = torch.arange(6) < torch.tensor([3, 6, 1])[:, None]
    expected = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=visible[:, None, None])
    torch.testing.assert_close(out, expected.transpose(1, 2) * visible[:, :, None, None])


def test_samples_longer_than_a_step():
    layout = vk.SegmentLayout([[40, 400]])
    assert 400 * 440 * 4 > STEP_SCORES
    q, k, v = torch.randn(3, 440, 4, 8, requires_grad=True).unbind()
    bias = torch.randn(1, 4, 440, 440, requires_grad=True)
    inputs, cotangent = (q, k, v, bias), torch.randn(440, 4, 8)
    outs = [
        vk.attention(q, k, v, layout=layout, mask=vk.SegmentMask.prefix_lm(), bias=bias, impl=impl)
        for impl in ("torch", "reference")
    ]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, cotangent) for out in outs), atol=1e-4, rtol=1e-4)


@compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_compiled_kernels_take_long_samples_in_steps(dtype):
    layout = vk.SegmentLayout([[90, 211], [3, 40], [170, 0]])
    tensors = dict(zip("qkv", torch.randn(3, layout.num_tokens, 2, 8).bfloat16().double()))
    options = {"layout": layout, "mask": vk.SegmentMask.prefix_lm(), "dropout_p": 0.2, "stream": 4}
    truth = results(reference.attention, tensors, options, torch.float64)
    eager = results(reference.attention, tensors, options, dtype)
    for name, tensor in results(vk.attention, tensors, options, dtype, impl="cpp").items():
        assert_close(name, tensor, eager[name], truth[name])


def test_blocks_of_one_shape_keep_their_own_masks():
    layout, keys = vk.SegmentLayout([[5], [5]]), vk.SegmentLayout([[0, 5], [2, 3]])
    q, k, v = torch.randn(3, 10, 2, 8).unbind()
    mask = vk.SegmentMask([["full", "causal"]])
    outs = [vk.attention(q, k, v, layout=layout, kv_layout=keys, mask=mask, impl=impl) for impl in ("torch", "reference")]
    torch.testing.assert_close(*outs)


def test_lse_joins_disjoint_keys():
    layout = vk.SegmentLayout([[3, 9], [2, 5]])
    q, k, v = torch.randn(3, 19, 2, 8, dtype=torch.float64, requires_grad=True).unbind()
    tables = [[["full", "none"]] * 2, [["none", "full"]] * 2]
    parts = [vk.attention(q, k, v, layout=layout, mask=vk.SegmentMask(t), return_lse=True) for t in tables]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    joined = sum(w.T[..., None] * out for w, (out, _) in zip(weights, parts))
    whole = vk.attention(q, k, v, layout=layout)
    torch.testing.assert_close(joined, whole)
    cotangent = torch.randn_like(whole)
    wanted = torch.autograd.grad(whole, (q, k, v), cotangent)
    torch.testing.assert_close(torch.autograd.grad(joined, (q, k, v), cotangent), wanted)


@pytest.mark.parametrize("shape", ((3, 1), (17, 40), (2, 16)))
def test_one_draw_serves_sixteen_columns(shape):
    rows, columns = shape
    position, head = torch.arange(rows), torch.arange(3)[:, None]
    state = vk.Rng(99).state
    sample = torch.tensor([4, 70000])[:, None, None]
    whole = generator.keep_columns(state, 2, sample, position, columns, 0.4, head)
    single = generator.keep_mask(state, 2, sample[..., None], position[:, None], torch.arange(columns), 0.4, head[..., None])
    assert torch.equal(whole, single) and whole.shape == (2, 3, rows, columns)


def test_dropout_does_not_depend_on_packing_order():
    qkv = torch.randn(20, 3, 2, 8)
    options = {"dropout_p": 0.5, "rng": vk.Rng(3), "stream": 1}
    out = vk.attention_qkvpacked(qkv, layout=vk.SegmentLayout([[13], [7]], sample_ids=[40, 41]), **options)
    swapped = torch.cat([qkv[13:], qkv[:13]])
    other = vk.attention_qkvpacked(swapped, layout=vk.SegmentLayout([[7], [13]], sample_ids=[41, 40]), **options)
    torch.testing.assert_close(out, torch.cat([other[7:], other[:7]]))
    elsewhere = vk.attention_qkvpacked(qkv, layout=vk.SegmentLayout([[13], [7]]), **options)
    assert not torch.allclose(out, elsewhere)


def test_dropout_keeps_the_expectation():
    layout = vk.SegmentLayout([[200]])
    q, k = torch.zeros(200, 4, 8), torch.zeros(200, 4, 8)
    out = vk.attention(q, k, torch.ones(200, 4, 8), layout=layout, dropout_p=0.3, rng=vk.Rng(1))
    assert abs(out.mean().item() - 1) < 0.01 and out.std() > 0.01


def test_few_graphs_over_many_layouts():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    draw = random.Random(0)

    @torch.compile(fullgraph=True, backend=count)
    def call(qkv, layout):
        return vk.attention_qkvpacked(qkv, layout=layout, mask=table)

    table = vk.SegmentMask.prefix_lm()
    for _ in range(30):
        layout = vk.SegmentLayout([[draw.randint(1, 9), draw.randint(1, 9)] for _ in range(draw.randint(2, 6))])
        qkv = torch.randn(layout.num_tokens, 3, 2, 8, requires_grad=True)
        out = call(qkv, layout)
        torch.testing.assert_close(out, vk.attention_qkvpacked(qkv, layout=layout, mask=table))
        torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert len(graphs) <= 2


@compiled
@pytest.mark.parametrize(
    "length, change, expected",
    (
        (4, {}, "cpp"),
        (4, {"bias": torch.zeros(1, 1, 4, 4)}, "torch"),
        (4, {"qkv": torch.randn(4, 3, 1, 8).double()}, "torch"),
        (1025, {}, "torch"),
    ),
)
def test_auto_takes_the_compiled_kernels_for_short_samples(length, change, expected):
    arguments = {"qkv": torch.randn(length, 3, 1, 8), "layout": vk.SegmentLayout([[length]])} | change
    with dispatch.recorded() as served:
        vk.attention_qkvpacked(**arguments)
    assert served == [("attention_qkvpacked", expected)]


def test_a_plan_made_in_inference_mode_serves_training():
    layout, qkv = vk.SegmentLayout([[11], [23]]), torch.randn(34, 3, 2, 8)
    with torch.inference_mode(), torch.device("meta"):
        expected = vk.attention_qkvpacked(qkv, layout=layout)
    out = vk.attention_qkvpacked(qkv.requires_grad_(), layout=layout)
    assert torch.equal(out, expected)
    assert torch.autograd.grad(out.sum(), qkv)[0].isfinite().all()


def test_second_derivatives_are_refused():
    qkv = torch.randn(4, 3, 1, 8, requires_grad=True)
    out = vk.attention_qkvpacked(qkv, layout=vk.SegmentLayout([[4]]))
    (grad,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), qkv)


LAYOUT = vk.SegmentLayout([[4], [6]])
SPLIT, OFF_DIAGONAL = vk.SegmentLayout([[1, 3], [2, 4]]), vk.SegmentMask([["full", "causal"], ["full", "full"]])


def from_bounds(bounds):
    return vk.SegmentLayout.from_cu_seqlens(torch.tensor(bounds), max_seqlen=10, num_tokens=10)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"q": torch.randn(9, 2, 8)}, r"q must be \[Tq, H, K\] = \[10, any, any\], got \[9, 2, 8\]"),
        ({"k": torch.randn(10, 2, 4)}, r"k must be \[Tk, Hkv, K\] = \[10, 2, 8\], got \[10, 2, 4\]"),
        ({"k": torch.randn(9, 2, 8)}, r"k must be \[Tk, Hkv, K\] = \[10, 2, 8\], got \[9, 2, 8\]"),
        ({"k": torch.randn(10, 8)}, r"k must be \[Tk, Hkv, K\] = \[10, any, 8\], got \[10, 8\]"),
        ({"v": torch.randn(10, 1, 8)}, r"v must be \[Tk, Hkv, K\] = \[10, 2, 8\], got \[10, 1, 8\]"),
        ({"v": torch.randn(10, 2, 8).double()}, "v must be float32, got float64"),
        ({"q": torch.zeros(10, 2, 8, dtype=torch.int32)}, "q must be one of float64, float32, bfloat16, float16, got int32"),
        ({"q": torch.randn(10, 3, 8)}, "heads of q must be a multiple of those of k, got H = 3, Hkv = 2"),
        ({"q": [[0.5]]}, "q must be a Tensor, got a list"),
        ({"softmax_scale": torch.tensor(0.5)}, "softmax_scale must be a number, got a Tensor: multiply q by one that is learned"),
        ({"kv_layout": vk.SegmentLayout([[10]])}, "kv_layout must have the samples of layout, B = 2, got 1"),
        ({"kv_index": torch.tensor([0, 2])}, r"kv_index must lie in \[0, 2\), got values from 0 to 2"),
        ({"kv_index": torch.tensor([0.0, 1.0])}, "kv_index must be one of int64, int32, got float32"),
        ({"kv_index": torch.tensor([0])}, r"kv_index must be \[B\] = \[2\], got \[1\]"),
        ({"mask": vk.SegmentMask.full(2)}, r"mask must be \[Sq, Sk\] = \[1, 1\], got \[2, 2\]"),
        ({"layout": SPLIT, "mask": OFF_DIAGONAL}, r"only the diagonal may be causal, got causal at \[0, 1\]"),
        ({"layout": SPLIT.to("meta")}, "all tensors must be on one device, got q on cpu, .*, layout on meta"),
        ({"layout": torch.tensor([0, 4, 10])}, "layout must be a SegmentLayout, got a Tensor"),
        ({"layout": None}, "layout must be a SegmentLayout, got a NoneType"),
        ({"mask": torch.ones(10, 10).bool()}, "mask must be a SegmentMask, got a Tensor"),
        ({"kv_layout": [[4], [6]]}, "kv_layout must be a SegmentLayout, got a list"),
        ({"bias": 0.5}, "bias must be a Tensor or a RelativeBias, got a float"),
        ({"bias": torch.ones(1, 1, 6, 6).bool()}, "bias must be one of float64, float32, bfloat16, float16, got bool"),
        ({"bias": torch.zeros(2, 2, 6, 5)}, r"bias must be .* = \[2 or 1, 2 or 1, >= 6, >= 6\], got \[2, 2, 6, 5\]"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\), got -0.1"),
        ({"dropout_p": float("nan")}, r"dropout_p must be in \[0, 1\), got nan"),
    ),
)
def test_mistakes_are_named_with_their_values(change, message):
    q, k, v = torch.randn(3, 10, 2, 8).unbind()
    with pytest.raises(ValueError, match=message) as error:
        vk.attention(**({"q": q, "k": k, "v": v, "layout": LAYOUT} | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"qkv": torch.randn(9, 3, 2, 8)}, r"qkv must be \[T, 3, H, K\] = \[10, 3, any, any\], got \[9, 3, 2, 8\]"),
        ({"qkv": torch.randn(10, 2, 2, 8)}, r"qkv must be \[T, 3, H, K\] = \[10, 3, any, any\], got \[10, 2, 2, 8\]"),
        ({"layout": torch.tensor([0, 4, 10])}, "layout must be a SegmentLayout, got a Tensor"),
        ({"layout": SPLIT, "mask": OFF_DIAGONAL}, r"only the diagonal may be causal, got causal at \[0, 1\]"),
        ({"bias": torch.zeros(1, 2, 5, 6)}, r"bias must be .* = \[2 or 1, 2 or 1, >= 6, >= 6\], got \[1, 2, 5, 6\]"),
    ),
)
def test_mistakes_in_the_packed_form_are_named_with_their_values(change, message):
    with pytest.raises(ValueError, match=message) as error:
        vk.attention_qkvpacked(**({"qkv": torch.randn(10, 3, 2, 8), "layout": LAYOUT} | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: vk.SegmentLayout([[4, -1], [3, 4]]), "lengths must not be negative, got -1"),
        (lambda: from_bounds([0, 7, 4, 10]), r"cu_seqlens must rise from 0 to at most num_tokens = 10, got \[0, 7, 4, 10\]"),
        (lambda: from_bounds([0, 4, 12]), r"cu_seqlens must rise from 0 to at most num_tokens = 10, got \[0, 4, 12\]"),
        (lambda: vk.SegmentLayout.padded([4, 6], 5), "lengths must be at most max_len = 5, got 6"),
        (lambda: vk.SegmentLayout([[4], [6]], capacity=9), "capacity must be at least the sum of the lengths = 10, got 9"),
        (lambda: vk.SegmentLayout([[2**30], [2**30]]), r"a layout holds at most 2\*\*31 - 1 tokens, got 2147483648"),
        (lambda: vk.SegmentLayout([[4], [6]], capacity=2**31), r"a layout holds at most 2\*\*31 - 1 tokens, got 2147483648"),
    ),
)
def test_no_call_sees_rows_that_overlap_or_do_not_exist(make, message):
    """Lengths that do not fit never become a layout, so no implementation has to look at them."""
    with pytest.raises(ValueError, match=message) as error:
        vk.attention_qkvpacked(torch.randn(10, 3, 2, 8), layout=make())
    assert "\n" not in str(error.value)



@pytest.mark.parametrize("impl, hides_by_bias", [pytest.param("cpp", False, marks=compiled), ("torch", False), ("torch", True)])
def test_gradients_that_arrive_at_the_lse_of_nothing_stay_there(impl, hides_by_bias):
    layout, mask, bias = vk.SegmentLayout([[2, 3]]), vk.SegmentMask([["none", "full"], ["none", "none"]]), None
    if hides_by_bias:
        mask, bias = None, torch.zeros(1, 1, 5, 5).index_fill_(2, torch.tensor([2, 3, 4]), -torch.inf)
    qkv = torch.randn(5, 3, 2, 8, requires_grad=True)
    out, lse = vk.attention_qkvpacked(qkv, layout=layout, mask=mask, bias=bias, return_lse=True, impl=impl)
    cotangent = torch.ones_like(lse).masked_fill(lse == -torch.inf, torch.nan)  # what joining two such parts sends back
    (grad,) = torch.autograd.grad((out, lse), qkv, (torch.ones_like(out), cotangent))
    assert grad.isfinite().all() and not grad[2:, 0].any()
