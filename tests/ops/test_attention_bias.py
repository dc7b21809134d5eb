"""Biases of attention: buckets as published, gradients to the tables, one object for all layers, models' own numbers."""

import doctest
import math
import random

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vlkernels as vk
from vlkernels.ops.attention import reference
from vlkernels.ops.attention.bias import MOST_DISTANCE, Buckets
from vlkernels.ops.attention.call import Call
from vlkernels.ops.attention.cpu import grouped
from vlkernels.ops.attention.cpu.tile_kernels import STEP_SCORES
from vlkernels.testing.error_rule import assert_close

DISTANCES = torch.arange(-2000, 2001)
# (num_buckets, max_distance, bidirectional) of T5's encoder and decoder, LayoutLMv2 and v3 (one and two dimensions), UDOP
PUBLISHED = ((32, 128, True), (32, 128, False), (64, 256, True), (32, 100, True))
# In float64 the first two would have other borders.
ODD = ((20, 160, True), (30, 480, False), (33, 129, True), (4, 2, True), (2, 2, False), (16, 1500, False), (320, 800, True))
LAYOUTLM = {"num_buckets": (32, 64, 64), "max_distance": (128, 256, 256)}


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).bfloat16().to(dtype).requires_grad_()


def tables_of(heads, *sizes, dtype=torch.float32):
    return [normal(size, heads, dtype=dtype) for size in sizes]


def by_place(tokens, heads=2, dtype=torch.float32):
    """Three coordinates that mostly rise along the tokens, and their tables."""
    return torch.randint(0, 40, (tokens, 3)).cumsum(0), tables_of(heads, 32, 64, 64, dtype=dtype)


@pytest.mark.parametrize("setting", PUBLISHED + ODD)
def test_buckets_are_those_of_transformers(setting):
    pytest.importorskip("transformers")
    from transformers.models.layoutlmv2.modeling_layoutlmv2 import relative_position_bucket
    from transformers.models.layoutlmv3.modeling_layoutlmv3 import LayoutLMv3Encoder
    from transformers.models.t5.modeling_t5 import T5Attention

    own, named = Buckets(*setting), dict(zip(("num_buckets", "max_distance", "bidirectional"), setting))
    for theirs in (relative_position_bucket, T5Attention._relative_position_bucket):
        assert torch.equal(own.of(DISTANCES), theirs(DISTANCES, **named))
    assert torch.equal(own.of(DISTANCES), LayoutLMv3Encoder.relative_position_bucket(None, DISTANCES, **named))


@pytest.mark.parametrize("setting", PUBLISHED + ODD)
def test_no_distance_beyond_the_largest_has_a_bucket_of_its_own(setting):
    own = Buckets(*setting)
    far = torch.cat([DISTANCES, torch.tensor([-(2**31) + 1, 2**31 - 1])])
    assert torch.equal(own.of(far), own.of(far.clamp(-own.max_distance, own.max_distance)))
    nearer = own.max_distance // 2
    assert setting in ODD or not torch.equal(own.of(far), own.of(far.clamp(-nearer, nearer)))


def test_the_bias_of_each_distance_is_read_from_its_bucket():
    tables = tables_of(2, 32, 64)
    settings = Buckets(32, 128, True), Buckets(64, 256, False)
    options = dict(zip(("num_buckets", "max_distance", "bidirectional"), zip(*settings)))
    bias = vk.RelativeBias(torch.zeros(3, 2, dtype=torch.int32), tables, **options, scale=0.5)
    assert bias.radius == 256 and bias.distance_bias.is_contiguous()
    distance = torch.arange(-256, 257)
    for c, (own, table) in enumerate(zip(settings, tables)):
        assert torch.equal(bias.distance_bias[:, c], 0.5 * table[own.of(distance)].T)


def draw_call(seed):
    """A random call with a relative bias in float64: any table, cross-attention, shared keys, grouped heads, dropout."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    samples, segments, longest = draw.randint(1, 5), draw.randint(1, 3), draw.choice((3, 9, 40))
    layout = vk.SegmentLayout(
        [[draw.randint(0, longest) for _ in range(segments)] for _ in range(samples)], capacity=samples * segments * longest
    )
    keys, kv_layout, kv_index = layout, None, None
    if draw.random() < 0.5:
        keys = kv_layout = vk.SegmentLayout([[draw.randint(0, longest), draw.randint(0, longest)] for _ in range(3)])
        kv_index = torch.tensor([draw.randrange(3) for _ in range(samples)])
    cells = ("none", "full", "full", "causal")
    mask = vk.SegmentMask(
        [[draw.choice(cells if kv_layout or q == k else cells[:3]) for k in range(keys.num_segments)] for q in range(segments)]
    )
    kv_heads, folded, count = draw.choice((1, 2)), draw.choice((1, 3)), draw.randint(1, 4)
    sizes = [draw.choice((4, 8, 32)) for _ in range(count)]
    rows = (layout.num_tokens, kv_heads * folded), (keys.num_tokens, kv_heads), (keys.num_tokens, kv_heads)
    tensors = {name: normal(*shape, 8, dtype=torch.float64) for name, shape in zip("qkv", rows)}
    tables = tables_of(kv_heads * folded, *sizes, dtype=torch.float64)
    spread = draw.choice((2, 30, 400))
    described = {
        "coordinates": torch.randint(0, spread, (layout.num_tokens, count)),
        "kv_coordinates": torch.randint(spread // 2, 2 * spread, (keys.num_tokens, count)) if draw.random() < 0.7 else None,
        "num_buckets": sizes,
        "max_distance": [draw.choice((20, 128)) for _ in range(count)],
        "bidirectional": [draw.random() < 0.7 for _ in range(count)],
        "scale": draw.choice((1.0, 0.25)),
    }
    if kv_layout is not None and described["kv_coordinates"] is None:
        described["kv_coordinates"] = described["coordinates"].new_zeros(keys.num_tokens, count)
    options = {"layout": layout, "mask": mask, "kv_layout": kv_layout, "kv_index": kv_index}
    return tensors, tables, described, options | {"dropout_p": draw.choice((0.0, 0.3)), "stream": 3}


def results(function, tensors, tables, described, options, dtype, **more):
    inputs = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    read = [t.detach().to(dtype).requires_grad_() for t in tables]
    bias = vk.RelativeBias(tables=read, **described)
    out, lse = function(**inputs, **options, bias=bias, rng=vk.Rng(5), return_lse=True, **more)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    total = (out * ramp).sum() + lse.masked_fill(lse.isinf(), 0).cos().sum().to(dtype)
    grads = torch.autograd.grad(total, [*inputs.values(), *read])
    names = [*inputs, *(f"tables[{c}]" for c in range(len(read)))]
    return {"out": out, "lse": lse} | {f"gradient of {name}": g for name, g in zip(names, grads)}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("seed", range(25))
def test_random_calls_obey_the_error_rule(seed, dtype):
    call = draw_call(seed)
    truth = results(reference.attention, *call, torch.float64)
    eager = results(reference.attention, *call, dtype)
    found = results(vk.attention, *call, dtype, impl="torch")
    for name, tensor in found.items():
        assert_close(name, tensor, eager[name], truth[name])
    for name, tensor in results(vk.attention, *call, dtype, impl="torch").items():
        assert torch.equal(tensor, found[name]), f"{name} differs between two runs"
    for name, tensor in results(vk.attention, *call, torch.float64, impl="torch").items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, truth[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ("torch", "reference"))
def test_equals_the_tensor_it_stands_for(impl):
    """Values and gradients of a bias written out pair by pair, by the distance of the key from the query."""
    layout = vk.SegmentLayout([[4, 7], [9, 1]])
    q, k, v = (normal(21, 2, 8) for _ in range(3))
    place, tables = by_place(21)
    dense = torch.zeros(2, 2, 11, 11)
    for sample, (start, stop) in enumerate(((0, 11), (11, 21))):
        own = place[start:stop]
        for c, (table, setting) in enumerate(zip(tables, ((32, 128, True), (64, 256, True), (64, 256, True)))):
            bucket = Buckets(*setting).of(own[None, :, c] - own[:, None, c])
            dense[sample, :, : len(own), : len(own)] += table[bucket].permute(2, 0, 1)
    mask, cotangent = vk.SegmentMask.prefix_lm(), torch.randn(21, 2, 8)
    relative = vk.RelativeBias(place, tables, **LAYOUTLM)
    outs = [vk.attention(q, k, v, layout=layout, mask=mask, bias=bias, impl=impl) for bias in (relative, dense)]
    torch.testing.assert_close(*outs)
    found, expected = (torch.autograd.grad(out, (q, k, v, *tables), cotangent, retain_graph=True) for out in outs)
    torch.testing.assert_close(found, expected)
    turned = vk.RelativeBias(-place, tables, **LAYOUTLM)
    assert not torch.allclose(vk.attention(q, k, v, layout=layout, mask=mask, bias=turned, impl=impl), outs[1], atol=1e-3)


@pytest.mark.parametrize("version", (2, 3))
def test_equals_layoutlm(version):
    transformers = pytest.importorskip("transformers")
    if version == 2:
        from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2Encoder as Encoder
        from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2SelfAttention as SelfAttention
    else:
        from transformers.models.layoutlmv3.modeling_layoutlmv3 import LayoutLMv3Encoder as Encoder
        from transformers.models.layoutlmv3.modeling_layoutlmv3 import LayoutLMv3SelfAttention as SelfAttention
    config_class = transformers.LayoutLMv2Config if version == 2 else transformers.LayoutLMv3Config
    config = config_class(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, fast_qkv=False)
    encoder, layer = Encoder(config).eval(), SelfAttention(config).eval()
    for parameter in (*encoder.parameters(), *layer.parameters()):
        nn.init.normal_(parameter, std=0.5)
    length = 150
    hidden, boxes, position = torch.randn(1, length, 32), torch.randint(0, 1000, (1, length, 4)), torch.arange(length)[None]
    names = ("calculate_1d_position_embeddings", "calculate_2d_position_embeddings") if version == 2 else (
        "cal_1d_pos_emb", "cal_2d_pos_emb")  # fmt: skip
    one, two = (getattr(encoder, f"_{name}")(x) for name, x in zip(names, (position, boxes)))
    nothing_hidden = torch.zeros(1, 1, 1, length)
    expected = layer(hidden, nothing_hidden, rel_pos=one, rel_2d_pos=two)[0]

    place = torch.stack((position[0], boxes[0, :, 0], boxes[0, :, 3]), 1)
    modules = encoder.rel_pos_bias, encoder.rel_pos_x_bias, encoder.rel_pos_y_bias
    scale = 1.0 if version == 2 else 1 / math.sqrt(16)
    bias = vk.RelativeBias(place, [m.weight.T for m in modules], **LAYOUTLM, scale=scale)
    q, k, v = (m(hidden[0]).unflatten(1, (2, 16)) for m in (layer.query, layer.key, layer.value))
    out = vk.attention(q, k, v, layout=vk.SegmentLayout([[length]]), bias=bias)
    torch.testing.assert_close(out.flatten(1), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", (False, True))
def test_equals_t5(decoder):
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(d_model=32, num_heads=2, d_kv=16, is_decoder=decoder, use_cache=False)
    config._attn_implementation = "eager"
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0, is_causal=decoder).eval()
    nn.init.normal_(layer.relative_attention_bias.weight)
    length, table = 200, layer.relative_attention_bias.weight
    hidden = torch.randn(1, length, 32)
    hidden_keys = torch.full((length, length), -torch.inf).triu(1)[None, None] if decoder else None
    expected = layer(hidden, mask=hidden_keys)[0][0]

    options = {"num_buckets": 32, "max_distance": 128, "bidirectional": not decoder}
    bias = vk.RelativeBias(torch.arange(length)[:, None], [table], **options)
    q, k, v = (m(hidden[0]).unflatten(1, (2, 16)) for m in (layer.q, layer.k, layer.v))
    layout, mask = vk.SegmentLayout([[length]]), vk.SegmentMask.causal() if decoder else None
    out = layer.o(vk.attention(q, k, v, layout=layout, mask=mask, bias=bias, softmax_scale=1.0).flatten(1))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, (table, layer.q.weight), cotangent) for x in (out, expected)), rtol=1e-3, atol=1e-4
    )


def test_layers_share_one_bias_and_its_gradient():
    layout, (place, tables) = vk.SegmentLayout([[5], [8]]), by_place(13)
    qkv = [normal(13, 3, 2, 8) for _ in range(3)]
    shared = vk.RelativeBias(place, tables, **LAYOUTLM)
    together = sum(vk.attention_qkvpacked(x, layout=layout, bias=shared).cos().sum() for x in qkv)
    found = torch.autograd.grad(together, tables, retain_graph=True)
    alone = [vk.attention_qkvpacked(x, layout=layout, bias=vk.RelativeBias(place, tables, **LAYOUTLM)).cos().sum() for x in qkv]
    torch.testing.assert_close(found, torch.autograd.grad(sum(alone), tables))


def test_a_bias_of_the_last_step_does_not_train_silently():
    layout, (place, tables) = vk.SegmentLayout([[5], [8]]), by_place(13)
    bias, qkv = vk.RelativeBias(place, tables, **LAYOUTLM), normal(13, 3, 2, 8)
    for step in range(2):
        loss = vk.attention_qkvpacked(qkv, layout=layout, bias=bias).sum()
        if step == 0:
            loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_bias_is_refused_once_its_tables_have_changed():
    layout, (place, tables) = vk.SegmentLayout([[5], [8]]), by_place(13)
    bias, qkv = vk.RelativeBias(place, tables, **LAYOUTLM), normal(13, 3, 2, 8)
    with torch.no_grad():
        vk.attention_qkvpacked(qkv, layout=layout, bias=bias)
        tables[1].mul_(2)
        with pytest.raises(ValueError, match="the tables of bias have changed since it was made: make a RelativeBias in every"):
            vk.attention_qkvpacked(qkv, layout=layout, bias=bias)


@pytest.mark.parametrize("impl", ("torch", "reference"))
@pytest.mark.parametrize("relative", (True, False))
def test_a_graph_that_is_kept_gives_its_gradients_again(relative, impl):
    layout, (place, tables) = vk.SegmentLayout([[5], [8]]), by_place(13)
    qkv, read = normal(13, 3, 2, 8), tables if relative else [normal(1, 2, 8, 8)]
    bias = vk.RelativeBias(place, tables, **LAYOUTLM) if relative else read[0]
    total = vk.attention_qkvpacked(qkv, layout=layout, bias=bias, dropout_p=0.2, impl=impl).cos().sum()
    first, second = (torch.autograd.grad(total, (qkv, *read), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_recomputed_layers_give_the_same_gradients():
    layout, (place, tables) = vk.SegmentLayout([[5], [8]]), by_place(13)
    qkv, rng = normal(13, 3, 2, 8), vk.Rng(3)

    def layer(x, bias):
        return x + vk.attention_qkvpacked(x, layout=layout, bias=bias, dropout_p=0.2, rng=rng).unsqueeze(1)

    found = []
    for recompute in (False, True):
        bias, x = vk.RelativeBias(place, tables, **LAYOUTLM), qkv
        for _ in range(2):
            x = checkpoint(layer, x, bias, use_reentrant=False) if recompute else layer(x, bias)
        found.append(torch.autograd.grad(x.cos().sum(), (qkv, *tables)))
    torch.testing.assert_close(*found)


MIXED = (torch.bfloat16, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.float64)


@pytest.mark.parametrize("table, q", MIXED)
def test_tables_of_another_dtype(table, q):
    layout, (place, tables) = vk.SegmentLayout([[5], [8]]), by_place(13)
    qkv = normal(13, 3, 2, 8)
    outs = []
    for dtype, data in ((table, q), (torch.float64, torch.float64)):
        read = [t.detach().to(dtype).requires_grad_() for t in tables]
        out = vk.attention_qkvpacked(qkv.to(data), layout=layout, bias=vk.RelativeBias(place, read, **LAYOUTLM), impl="torch")
        outs.append((out, torch.autograd.grad(out.double().cos().sum(), read)))
    (out, grads), (expected, wanted) = outs
    assert out.dtype == q and all(g.dtype == table for g in grads)
    assert q != torch.float64 or (out - expected).abs().max() < 1e-12
    torch.testing.assert_close(out, expected, check_dtype=False, rtol=1e-5, atol=1e-5)
    for mine, true in zip(grads, wanted):
        torch.testing.assert_close(mine, true, check_dtype=False, rtol=1e-2, atol=1e-2 * float(true.abs().max()))


def test_samples_longer_than_a_step():
    layout, heads = vk.SegmentLayout([[40, 400], [80, 40]]), 4
    place, tables = by_place(560, heads)
    inputs, cotangent = (normal(560, 3, heads, 8), *tables), torch.randn(560, heads, 8)
    outs = [
        vk.attention_qkvpacked(
            inputs[0], layout=layout, mask=vk.SegmentMask.prefix_lm(), bias=vk.RelativeBias(place, tables, **LAYOUTLM), impl=impl
        )
        for impl in ("torch", "reference")
    ]
    assert 400 * 440 * heads > STEP_SCORES
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, cotangent) for out in outs), atol=1e-4, rtol=1e-4)


class Sizes(TorchDispatchMode):
    """The elements of the largest tensor that any operator makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and 0 not in tensor.stride():
                self.largest = max(self.largest, tensor.numel())
        return made


def test_no_array_of_all_pairs_is_ever_made():
    layout, heads = vk.SegmentLayout([[900, 200]]), 4
    place, tables = by_place(1100, heads)
    bias = vk.RelativeBias(place, [t.detach() for t in tables], **LAYOUTLM)
    table = vk.SegmentMask.prefix_lm().table("cpu")
    where = [layout.starts, layout.lengths, None, None, None, table]
    biases = [None, bias.distance_bias, bias.coordinates, None]
    call = Call([torch.randn(1100, 3, heads, 8)], *where, *biases, layout.sample_ids, None, 0.3, 0.0, 0, 1100, bias.radius)
    with Sizes() as sizes, torch.no_grad():
        out, lse = grouped.forward(*call)
        grads = grouped.backward(torch.randn_like(out), None, out, lse, True, *call)
    assert grads[1].shape == bias.distance_bias.shape and grads[1].any()
    assert sizes.largest <= STEP_SCORES < 1100 * 1100 * heads


def test_the_number_of_threads_changes_no_bit():
    call, threads, found = draw_call(7), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(vk.attention, *call, torch.float32, impl="torch"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in found)))


def given(qkv, layout, bias):
    return vk.attention_qkvpacked(qkv, layout=layout, bias=bias)


def made(qkv, layout, bias):
    again = vk.RelativeBias(bias.coordinates, bias.tables, **LAYOUTLM, scale=0.5)
    return vk.attention_qkvpacked(qkv, layout=layout, bias=again)


@pytest.mark.parametrize("function", (given, made))
def test_few_graphs_over_many_layouts(function):
    torch._dynamo.reset()
    counter, draw = CompileCounterWithBackend("eager"), random.Random(0)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for _ in range(25):
        layout = vk.SegmentLayout([[draw.randint(2, 9), draw.randint(2, 9)] for _ in range(draw.randint(2, 6))])
        place, tables = by_place(layout.num_tokens)
        qkv, bias = normal(layout.num_tokens, 3, 2, 8), vk.RelativeBias(place, tables, **LAYOUTLM, scale=0.5)
        outs = compiled(qkv, layout, bias), function(qkv, layout, bias)
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), (qkv, *tables), retain_graph=True) for out in outs))
    assert counter.frame_count <= 2


def test_meta_tensors_have_the_shapes():
    layout, (place, tables) = vk.SegmentLayout([[5], [8]]).to("meta"), by_place(13)
    bias = vk.RelativeBias(place, tables, **LAYOUTLM, kv_coordinates=place + 1).to("meta")
    assert bias.kv_coordinates.device.type == bias.distance_bias.device.type == "meta" and bias.scale == 1.0
    qkv = torch.empty(13, 3, 2, 8, device="meta", requires_grad=True)
    out = vk.attention_qkvpacked(qkv, layout=layout, bias=bias)
    assert out.shape == (13, 2, 8)
    assert [g.shape for g in torch.autograd.grad(out, bias.tables, torch.empty_like(out))] == [t.shape for t in tables]


def test_on_its_own_device_a_bias_is_itself():
    place, tables = by_place(3)
    bias = vk.RelativeBias(place, tables, **LAYOUTLM)
    assert bias.to("cpu") is bias and "heads=2" in repr(bias)


def test_auto_takes_the_tiles_and_the_compiled_kernels_refuse():
    layout, (place, tables) = vk.SegmentLayout([[5], [8]]), by_place(13)
    bias, qkv = vk.RelativeBias(place, tables, **LAYOUTLM), normal(13, 3, 2, 8)
    with vk.recorded() as served:
        vk.attention_qkvpacked(qkv, layout=layout, bias=bias)
    assert served == [("attention_qkvpacked", "torch")]
    with pytest.raises(ValueError, match='impl="cpp"'):
        vk.attention_qkvpacked(qkv, layout=layout, bias=bias, impl="cpp")


def test_a_bias_over_no_tokens():
    layout = vk.SegmentLayout(torch.zeros(0, 1, dtype=torch.int64))
    (table,) = tables_of(2, 32)
    bias = vk.RelativeBias(torch.zeros(0, 1, dtype=torch.int32), [table], num_buckets=32, max_distance=128)
    out = vk.attention_qkvpacked(torch.zeros(0, 3, 2, 8, requires_grad=True), layout=layout, bias=bias)
    assert out.shape == (0, 2, 8) and not torch.autograd.grad(out.sum(), table)[0].any()


def test_the_example_runs():
    (test,) = doctest.DocTestFinder(recurse=False).find(vk.RelativeBias, "RelativeBias", globs={"torch": torch, "vk": vk})
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


PLACE = torch.zeros(10, 2, dtype=torch.int32)
TABLES = [torch.zeros(32, 2), torch.zeros(32, 2)]
SETTING = {"coordinates": PLACE, "tables": TABLES, "num_buckets": 32, "max_distance": 128}


@pytest.mark.parametrize(
    "change, message",
    (
        ({"coordinates": [[1, 2]]}, "coordinates must be a Tensor, got a list"),
        ({"coordinates": PLACE.float()}, "coordinates must be one of int64, int32, got float32"),
        ({"coordinates": PLACE[:, 0]}, r"coordinates must be \[T, C\] = \[any, any\], got \[10\]"),
        ({"coordinates": PLACE.repeat(1, 3)}, r"coordinates must be \[T, C\] with 1 <= C <= 4, got \[10, 6\]"),
        ({"coordinates": PLACE + 2**30}, r"coordinates must lie in \[-1073741824, 1073741824\), got values from 1073741824"),
        ({"kv_coordinates": PLACE[:, :1]}, r"kv_coordinates must be \[T, C\] = \[any, 2\], got \[10, 1\]"),
        ({"coordinates": PLACE.to("meta")}, "all tensors must be on one device, got coordinates on meta"),
        ({"tables": TABLES[:1]}, "tables must be one per coordinate, C = 2, got 1"),
        ({"tables": [TABLES[0], torch.zeros(64, 2)]}, r"tables\[1\] must be \[num_buckets, H\] = \[32, 2\], got \[64, 2\]"),
        ({"tables": [TABLES[0], torch.zeros(32, 3)]}, r"tables\[1\] must be \[num_buckets, H\] = \[32, 2\], got \[32, 3\]"),
        ({"tables": [TABLES[0].int(), TABLES[1]]}, r"tables\[0\] must be one of float64, .*, got int32"),
        ({"num_buckets": (32, 32, 32)}, r"num_buckets must be one value or one per coordinate, C = 2, got \[32, 32, 32\]"),
        ({"tables": [None, TABLES[1]]}, r"tables\[0\] must be a Tensor, got a NoneType"),
        ({"num_buckets": 32.0}, r"num_buckets and max_distance must be whole numbers .*, got \(32.0, 128, True\)"),
        ({"bidirectional": "no"}, r"bidirectional a bool, got \(32, 128, 'no'\)"),
        ({"num_buckets": 3}, r"num_buckets must be at least 4 \(bidirectional: True\), got 3"),
        ({"num_buckets": 1, "bidirectional": False}, r"num_buckets must be at least 2 \(bidirectional: False\), got 1"),
        ({"max_distance": 8}, r"max_distance must lie in \[9, 16384\] for 32 buckets \(bidirectional: True\), got 8"),
        ({"max_distance": MOST_DISTANCE + 1}, r"max_distance must lie in \[9, 16384\] .*, got 16385"),
    ),
)
def test_mistakes_in_a_bias_are_named_with_their_values(change, message):
    with pytest.raises(ValueError, match=message):
        vk.RelativeBias(**(SETTING | change))


@pytest.mark.parametrize(
    "change, of_call, message",
    (
        ({"coordinates": PLACE[:9]}, {}, r"coordinates of bias must be \[Tq, C\] = \[10, any\], got \[9, 2\]"),
        ({"tables": [torch.zeros(32, 3)] * 2}, {}, "the tables of bias must have the heads of q, H = 2, got 3"),
        ({"kv_coordinates": PLACE[:9]}, {}, r"kv_coordinates of bias must be \[Tk, C\] = \[10, any\], got \[9, 2\]"),
        ({}, {"keys": [[4], [2]]}, r"coordinates of bias must be \[Tk, C\] = \[6, any\], got \[10, 2\]"),
    ),
)
def test_a_bias_that_does_not_fit_the_call_is_named(change, of_call, message):
    layout, q = vk.SegmentLayout([[4], [6]]), torch.randn(10, 2, 8)
    kv_layout = vk.SegmentLayout(of_call["keys"]) if of_call else None
    k, v = torch.randn(2, 6 if of_call else 10, 2, 8)
    with pytest.raises(ValueError, match=message):
        vk.attention(q, k, v, layout=layout, kv_layout=kv_layout, bias=vk.RelativeBias(**(SETTING | change)))


def test_a_bias_on_another_device_is_named():
    layout, bias = vk.SegmentLayout([[4], [6]]), vk.RelativeBias(**SETTING).to("meta")
    with pytest.raises(ValueError, match="all tensors must be on one device, got qkv on cpu, bias on meta"):
        vk.attention_qkvpacked(torch.randn(10, 3, 2, 8), layout=layout, bias=bias)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", ((1, 1), (3, 1), (1, 4), (3, 4)))
def test_a_tensor_larger_than_the_samples_is_read_and_credited_in_place(shape, dtype):
    """Gradients of what no pair reads, and of a key that -inf hides, are 0; the others are sums over what shares them."""
    layout, mask = vk.SegmentLayout([[3, 4], [0, 0], [5, 1]], capacity=15), vk.SegmentMask.prefix_lm()
    found = []
    for work, impl in ((dtype, "torch"), (dtype, "reference"), (torch.float64, "reference")):
        torch.manual_seed(0)
        q, k, v = normal(15, 4, 8, dtype=work), normal(15, 2, 8, dtype=work), normal(15, 2, 8, dtype=work)
        values = torch.randn(*shape, 9, 12).bfloat16().to(work)
        values[:, :, 2, 1] = values[:, :, 6] = -torch.inf
        values[:, :, 7:] = values[..., 7:] = torch.nan
        bias = values.requires_grad_()
        out, lse = vk.attention(q, k, v, layout=layout, mask=mask, bias=bias, return_lse=True, impl=impl)
        total = out.double().cos().sum() + lse.masked_fill(lse.isinf(), 0).double().sin().sum()
        found.append((out, lse, *torch.autograd.grad(total, (q, k, v, bias))))
    for name, mine, eager, true in zip(("out", "lse", "dq", "dk", "dv", "dbias"), *found):
        assert_close(name, mine, eager, true)
    grad = found[0][-1]
    assert grad.dtype == dtype and not grad[:, :, 7:].any() and not grad[..., 7:].any() and not grad[:, :, 6].any()
    assert not grad[:, :, 2, 1].any() and grad[0, :, :2, :3].all()
