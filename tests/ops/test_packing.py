"""What is special to packing: any dtype, what is never read, what is written, fixed order of sums, one graph for all lengths."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import vlkernels as vk
from benchmarks.run import benchmarks_of
from vlkernels.core import native
from vlkernels.ops.packing import benchmarks as packing_benchmarks, spec as packing_spec
from vlkernels.testing.contract import poisoned_memory

HERE = ("reference",) if native.missing("join_segments") else ("cpp", "reference")
LENGTHS = [[3, 5], [0, 4], [7, 0], [0, 0], [2, 6]]
WIDTHS = (7, 9)


def loop_pack(tensors, layout):
    """The rows one by one, in plain Python."""
    out = tensors[0].new_zeros(layout.num_tokens, *tensors[0].shape[2:])
    for b, row in enumerate(layout.lengths.tolist()):
        for s, length in enumerate(row):
            for t in range(length):
                out[layout.starts[b, s] + t] = tensors[s][b, t]
    return out


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float64, torch.complex64])
@pytest.mark.parametrize("trailing", [(), (4,), (2, 3)])
def test_any_dtype_and_any_trailing_shape_round_trips(impl, dtype, trailing):
    layout = vk.SegmentLayout(LENGTHS, capacity=31)
    padded = [torch.randint(0, 2, (5, width, *trailing)).to(dtype) for width in WIDTHS]
    packed = vk.pack(padded, layout, impl=impl)
    assert packed.dtype == dtype and torch.equal(packed, loop_pack(padded, layout))
    back = vk.unpack(packed, layout, WIDTHS, impl=impl)
    for tensor, original, s in zip(back, padded, range(2)):
        valid = (torch.arange(WIDTHS[s]) < layout.lengths[:, s, None]).view(5, WIDTHS[s], *[1] * len(trailing))
        assert torch.equal(tensor, torch.where(valid, original, torch.zeros((), dtype=dtype)))
    streams = vk.take_segments(packed, layout, ((1,), (0,)), impl=impl)
    assert torch.equal(vk.put_segments(streams, layout, ((1,), (0,)), impl=impl), packed)


@pytest.mark.parametrize("impl", HERE)
def test_what_is_nobodys_is_never_read_and_always_written(impl):
    layout = vk.SegmentLayout(LENGTHS, capacity=40)
    padded = [torch.full((5, width, 3), torch.nan) for width in WIDTHS]
    for tensor, lengths in zip(padded, layout.lengths.T):
        for b, length in enumerate(lengths.tolist()):
            tensor[b, :length] = b
        tensor.requires_grad_()
    with poisoned_memory():
        packed = vk.pack(padded, layout, impl=impl)
        cotangent = torch.ones_like(packed)
        cotangent[27:] = torch.nan
        gradients = torch.autograd.grad(packed, padded, cotangent)
    assert torch.equal(packed[27:], torch.zeros(13, 3)) and packed.isfinite().all()
    for s, gradient in enumerate(gradients):
        valid = torch.arange(WIDTHS[s]) < layout.lengths[:, s, None]
        assert torch.equal(gradient, valid[..., None].expand_as(gradient).float())


@pytest.mark.parametrize("impl", HERE)
def test_only_the_gradients_that_are_wanted_are_made(impl):
    layout = vk.SegmentLayout(LENGTHS)
    text, image = torch.randn(5, 7, 4, requires_grad=True), torch.randn(5, 9, 4)
    packed = vk.pack((text, image), layout, impl=impl)
    packed.square().sum().backward()
    assert image.grad is None and torch.equal(text.grad[0, :3], 2 * text[0, :3]) and not text.grad[1].any()
    x = torch.randn(27, 4, requires_grad=True)
    vk.unpack(x, layout, impl=impl)[1].sum().backward()
    assert torch.equal(x.grad[:, 0], (layout.token_segment() == 1).float())


@pytest.mark.parametrize("impl", HERE)
def test_duplicate_gradients_are_added_in_float32_in_order(impl):
    x = torch.zeros(3, 600, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.full((1000,), 1, dtype=torch.int32)
    cotangent = torch.full((1000, 600), 0.0078125, dtype=torch.bfloat16)  # in bfloat16 the sum would stop at 4
    (gradient,) = torch.autograd.grad(vk.take_rows(x, positions, impl=impl), x, cotangent)
    assert torch.equal(gradient, torch.tensor([0, 7.8125, 0])[:, None].expand(3, 600).bfloat16())


@pytest.mark.skipif("cpp" not in HERE, reason="needs the compiled library")
@pytest.mark.parametrize("level", native.CPU_ISA_LEVELS)
def test_results_do_not_depend_on_threads_or_instruction_set(level):
    torch.manual_seed(0)
    layout = vk.SegmentLayout(torch.randint(0, 60, (48, 2)))
    x = torch.randn(layout.num_tokens, 130).bfloat16().requires_grad_()
    positions = torch.randint(-1, layout.num_tokens, (4000,))

    def results():
        rows, mean = vk.take_rows(x, positions, impl="cpp"), vk.segment_mean(x, layout, 1, impl="cpp")
        return rows, mean, *torch.autograd.grad(rows, x, rows.detach()), *torch.autograd.grad(mean, x, mean.detach())

    threads, expected = torch.get_num_threads(), results()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            native.limit_cpu_isa(level)
            assert all(torch.equal(a, b) for a, b in zip(results(), expected))
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])
        torch.set_num_threads(threads)


def random_layout(rng, num_samples, longest=11):
    return vk.SegmentLayout([[rng.randrange(longest), rng.randrange(2, longest)] for _ in range(num_samples)] + [[2, 2]])


def step(tensors, layout, positions):
    x = vk.pack(tensors, layout)
    text, image = vk.take_segments(x, layout, ((0,), (1,)))
    x = vk.put_segments((text.sin(), image.cos()), layout, ((0,), (1,)))
    padded = vk.unpack(x, layout)
    return sum(t.sum() for t in padded), vk.take_rows(x, positions).sum(), vk.segment_mean(x, layout, 1).sum()


def test_at_most_two_graphs_for_all_layouts():
    torch._dynamo.reset()
    rng, counter = random.Random(0), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    # The second layout differs from the first in every size, so that torch learns from it that all of them vary.
    for layout in (random_layout(rng, 3, 5), *(random_layout(rng, rng.randrange(4, 9)) for _ in range(60))):
        shapes = [(layout.num_samples, longest + rng.randrange(3), 4) for longest in layout.max_segment_lengths]
        tensors = tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
        positions = torch.randint(-1, layout.num_tokens, (rng.randrange(2, 20),))
        losses = compiled(tensors, layout, positions)
        expected = step(tensors, layout, positions)
        torch.testing.assert_close(losses, expected)
        for mine, true in zip(torch.autograd.grad(sum(losses), tensors), torch.autograd.grad(sum(expected), tensors)):
            torch.testing.assert_close(mine, true)
    assert counter.frame_count in (1, 2)


@pytest.mark.parametrize("impl", HERE)
def test_results_larger_than_the_caches(impl):
    """These are written past the caches where a row is a multiple of 16 bytes."""
    layout = vk.SegmentLayout(torch.full((64, 2), 40), capacity=5200)
    for width in (512, 509):
        padded = [torch.randn(64, 60, width) for _ in range(2)]
        packed = vk.pack(padded, layout, impl=impl)
        assert packed.numel() * packed.element_size() > 8 << 20
        valid = torch.cat([tensor[:, None, :40] for tensor in padded], dim=1)
        assert torch.equal(packed[:5120], valid.flatten(0, 2)) and not packed[5120:].any()
        text, _ = vk.unpack(packed, layout, (60, 60), impl=impl)
        assert torch.equal(text[:, :40], padded[0][:, :40]) and not text[:, 40:].any()


def test_gradients_are_each_others_partner():
    """<A x, y> = <x, A^T y> for joining and splitting, taking and adding."""
    layout = vk.SegmentLayout(LENGTHS, capacity=30)
    padded = [torch.randn(5, width, 4, dtype=torch.float64, requires_grad=True) for width in WIDTHS]
    y = torch.randn(30, 4, dtype=torch.float64)
    gradients = torch.autograd.grad(vk.pack(padded, layout), padded, y)
    assert all(torch.equal(g, u) for g, u in zip(gradients, vk.unpack(y, layout, WIDTHS)))


@pytest.mark.skipif("cpp" not in HERE, reason="needs the compiled library")
def test_backwards_refuse_a_second_derivative():
    x = torch.randn(9, 4, requires_grad=True)
    rows = vk.take_rows(x, torch.tensor([1, 1]), impl="cpp")
    (gradient,) = torch.autograd.grad(rows.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.skipif("cpp" not in HERE, reason="needs the compiled library")
def test_a_layout_that_lies_about_its_rows_is_refused_not_read():
    x, starts = torch.randn(9, 4), torch.tensor([[0], [6]], dtype=torch.int32)
    lengths = torch.tensor([[6], [4]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="segment 0 of sample 1 has 4 rows from row 6, but the packed tensor ends at row 9"):
        torch.ops.vlkernels.split_segments(x, [0], None, starts, lengths, [6])
    with pytest.raises(RuntimeError, match=r"positions must lie in \[-1, 9\), got 9"):
        torch.ops.vlkernels.take_rows(x, torch.tensor([9]), 1)


def test_peers_compute_the_same(monkeypatch):
    """What the benchmarks of a CPU compare with is the same function."""
    monkeypatch.setattr(packing_benchmarks, "BATCH", 4)
    monkeypatch.setattr(packing_benchmarks, "WIDTH", 16)
    for spec in packing_spec.SPECS:
        for benchmark in benchmarks_of(spec, "cpu").values():
            arguments = benchmark.make(packing_spec.InputMaker(torch.float32))
            expected = spec.functional(**arguments)
            for peer in benchmark.peers.values():
                torch.testing.assert_close(peer(**arguments), expected)


def mistakes():
    layout = vk.SegmentLayout([[3, 2], [1, 4]])
    x, text, image = torch.randn(10, 8), torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    return [
        (lambda: vk.pack((text,), layout), "tensors must be one per segment = 2, got 1"),
        (lambda: vk.pack((text[:, :2], image), layout), r"tensors\[0\] must be \[B, T, ...\] with T >= .* = 3, got T = 2"),
        (lambda: vk.pack((text, image[:1]), layout), r"tensors\[1\] must be .* = \[2, any, 8\], got \[1, 4, 8\]"),
        (lambda: vk.pack((text, image.half()), layout), r"tensors\[1\] must be float32, got float16"),
        (lambda: vk.unpack(x[:9], layout), r"x must be \[num_tokens, ...\] = \[10, 8\], got \[9, 8\]"),
        (lambda: vk.unpack(x, layout, (2, 4)), r"max_lengths must be at least \[3, 4\], got \[2, 4\]"),
        (lambda: vk.unpack(x, layout, (3,)), "max_lengths must be one per segment = 2, got 1"),
        (lambda: vk.take_segments(x, layout, (0, 0)), "segments must be indices below 2, .*none twice"),
        (lambda: vk.take_segments(x, layout, (2,)), r"segments must be indices below 2.*got \(2,\)"),
        (lambda: vk.take_segments(x, layout, ()), "segments must be indices"),
        (lambda: vk.put_segments(x, layout, (1,)), r"rows must be .* = \[6, 8\], got \[10, 8\]"),
        (lambda: vk.put_segments((x[:4],), layout, ((0,), (1,))), "one tensor per group of segments = 2, got 1"),
        (lambda: vk.take_rows(x, torch.tensor([0, 10])), r"positions must lie in \[-1, 10\), got values from 0 to 10"),
        (lambda: vk.take_rows(x, torch.tensor([0.5])), "positions must be one of int64, int32, got float32"),
        (lambda: vk.take_rows(x, torch.tensor([0, 1]), 1), "capacity must be at least .* = 2, got 1"),
        (lambda: vk.segment_mean(x, layout, 2), "segment must be an index below 2, got 2"),
        (lambda: vk.segment_mean(x.long(), layout, 0), "x must be one of .*got int64"),
        (lambda: vk.segment_mean(x.double(), layout, 0, impl="cpp"), "cannot run with impl=\"cpp\""),
        (lambda: vk.pack((), layout), "tensors must be one per segment = 2, got 0"),
        (lambda: vk.pack(text, layout), "tensors must be one per segment = 2, got a Tensor"),
        (lambda: vk.pack((text.tolist(), image), layout), r"tensors\[0\] must be a Tensor, got a list"),
        (lambda: vk.pack((text, image[..., :4]), layout), r"tensors\[1\] must be .* = \[2, any, 8\], got \[2, 4, 4\]"),
        (lambda: vk.pack((text[0, 0, 0], image), layout), r"tensors\[0\] must be \[B, T, ...\] = \[2, any\], got \[\]"),
        (lambda: vk.pack((text, image), layout.lengths), "layout must be a SegmentLayout, got a Tensor"),
        (lambda: vk.unpack(x.tolist(), layout), "x must be a Tensor, got a list"),
        (lambda: vk.unpack(x, layout, 4), "max_lengths must be one per segment = 2, got 1"),
        (lambda: vk.unpack(x, layout, (3.0, 4.0)), "max_lengths must be an integer below 2\\*\\*31, got 3.0"),
        (lambda: vk.unpack(x, layout, (3, 2**31)), f"max_lengths must be an integer below 2\\*\\*31, got {2**31}"),
        (lambda: vk.take_segments(x, layout, 1), "segments must be indices below 2, or groups of them, .*got 1"),
        (lambda: vk.take_segments(x, layout, (0, (1,))), r"segments must be .*groups of them, .*got \(0, \(1,\)\)"),
        (lambda: vk.take_segments(x, layout, (0.5,)), r"segments must be indices below 2.*got \(0.5,\)"),
        (lambda: vk.put_segments([x[4:]], layout, (1,)), "rows must be a Tensor, got a list"),
        (lambda: vk.put_segments(x, layout, ((0,), (1,))), "one tensor per group of segments = 2, got 1"),
        (lambda: vk.put_segments((x[:4], x[4:].half()), layout, ((0,), (1,))), r"rows\[1\] must be float32, got float16"),
        (lambda: vk.take_rows(x.tolist(), torch.tensor([0])), "x must be a Tensor, got a list"),
        (lambda: vk.take_rows(x, [0, 1]), "positions must be a Tensor, got a list"),
        (lambda: vk.take_rows(x, torch.zeros(2, 2, dtype=torch.int64)), r"positions must be \[M\] = \[any\], got \[2, 2\]"),
        (lambda: vk.take_rows(x[:0], torch.tensor([0])), r"positions must lie in \[-1, 0\), got values from 0 to 0"),
        (lambda: vk.take_rows(x, torch.tensor([0]), 2.5), "capacity must be an integer below 2\\*\\*31, got 2.5"),
        (lambda: vk.take_rows(x, torch.tensor([0]), 2**62), "capacity must be an integer below 2\\*\\*31, got 4611686018427387904"),
        (lambda: vk.segment_mean(x, layout, 0.0), "segment must be an index below 2, got 0.0"),
        (lambda: vk.SegmentLayout([[2**30, 2**30]]), r"at most 2\*\*31 - 1 tokens, got 2147483648"),
        (lambda: vk.pack((text, image.to("meta")), layout), r"on one device, got tensors\[1\] on meta, layout on cpu"),
        (lambda: vk.unpack(x.to("meta"), layout), "on one device, got x on meta, layout on cpu"),
        (lambda: vk.put_segments(x[4:].to("meta"), layout, (1,)), "on one device, got rows on meta, layout on cpu"),
        (lambda: vk.take_rows(x, torch.zeros(2, dtype=torch.int64, device="meta")), "got x on cpu, positions on meta"),
        (lambda: vk.segment_mean(x, layout.to("meta"), 0), "on one device, got x on cpu, layout on meta"),
    ]


@pytest.mark.parametrize("call, message", mistakes())
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()



def test_rows_of_a_scalar_are_refused():
    with pytest.raises(ValueError, match="got a tensor without dimensions"):
        vk.take_rows(torch.tensor(1.0), torch.tensor([0]))


@pytest.mark.parametrize("impl", HERE)
def test_empty_calls(impl):
    """No sample, no row, no column, nothing but zeros: results of the right shape, and gradients of theirs."""
    nobody = vk.SegmentLayout(torch.zeros(0, 2, dtype=torch.int64), capacity=3)
    empty = vk.SegmentLayout([[0, 0], [0, 0]])
    for layout, samples in ((nobody, 0), (empty, 2)):
        padded = [torch.randn(samples, 2, 4, requires_grad=True) for _ in range(2)]
        packed = vk.pack(padded, layout, impl=impl)
        assert torch.equal(packed, torch.zeros(layout.num_tokens, 4))
        assert all(not g.any() and g.shape == p.shape for g, p in zip(torch.autograd.grad(packed.sum(), padded), padded))
        text, image = vk.unpack(packed, layout, (1, 2), impl=impl)
        assert text.shape == (samples, 1, 4) and not image.any()
        assert vk.take_segments(packed, layout, (1,), impl=impl).shape == (0, 4)
        assert not vk.put_segments(torch.randn(0, 4), layout, (0,), impl=impl).any()
        assert torch.equal(vk.segment_mean(packed, layout, 0, impl=impl), torch.zeros(samples, 4))
    x = torch.randn(3, 0, requires_grad=True)
    rows = vk.take_rows(x, torch.tensor([1, 1, -1]), 5, impl=impl)
    assert rows.shape == (5, 0) and torch.autograd.grad(rows.sum(), x)[0].shape == (3, 0)
    assert torch.equal(vk.take_rows(torch.randn(0, 2), torch.tensor([-1]), 2, impl=impl), torch.zeros(2, 2))
    assert vk.segment_mean(torch.randn(2, 0), vk.SegmentLayout([[2]]), 0, impl=impl).shape == (1, 0)
