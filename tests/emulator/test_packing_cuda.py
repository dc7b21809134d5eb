"""The CUDA kernels of packing, run thread by thread on the CPU from the sources and by the plan of the launcher."""

import mmap

import pytest
import torch

import vlkernels as vk
from tests import emulated
from tests.emulated import packing as emulated_packing
from tests.ops.test_packing import test_empty_calls as check_empty_calls
from vlkernels.core import dispatch
from vlkernels.ops.packing.spec import SPECS
from vlkernels.testing import contract
from vlkernels.testing.contract import poisoned_memory

pytestmark = pytest.mark.skipif(emulated.refusal() is not None, reason=str(emulated.refusal()))
CASES = [(spec, case) for spec in SPECS for case in spec.cases]
LENGTHS = [[0, 3, 5], [0, 0, 4], [7, 0, 0], [0, 0, 0], [2, 6, 1]]
STREAMS = ((2, 0), (1,))


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    with emulated_packing.serving(monkeypatch):
        module = emulated_packing.kernels()
        yield module
        module.run_in_order()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec, case", CASES, ids=[f"{spec.name}-{case.name}" for spec, case in CASES])
def test_contract(spec, case, dtype):
    contract.verify(spec, case, dtype, "cuda")


def values(shape, dtype):
    """Any bits, but no NaN, which equals nothing."""
    drawn = torch.randint(0, 256, (*shape, torch.empty(0, dtype=dtype).element_size()), dtype=torch.uint8)
    as_dtype = drawn.view(dtype).squeeze(-1) if dtype != torch.bool else drawn.squeeze(-1) > 127
    return as_dtype.nan_to_num() if as_dtype.is_floating_point() else as_dtype


def moved(layout, trailing, dtype, shift=0):
    """What everything that only copies gives with the kernels, and by definition; inputs lie `shift` elements off a boundary."""

    def off(tensor):
        whole = torch.empty(tensor.numel() + shift, dtype=tensor.dtype)
        whole[shift:] = tensor.flatten()
        return whole[shift:].view(tensor.shape)

    widths = [longest + 1 for longest in layout.max_segment_lengths]
    padded = [off(values((layout.num_samples, width, *trailing), dtype)) for width in widths]
    packed = off(values((layout.num_tokens, *trailing), dtype))
    positions = torch.randint(-1, layout.num_tokens, (layout.num_tokens,), dtype=torch.int32)
    results = {}
    for impl in ("cuda", "reference"):
        streams = vk.take_segments(packed, layout, STREAMS, impl=impl)
        results[impl] = [
            vk.pack(padded, layout, impl=impl),
            *vk.unpack(packed, layout, widths, impl=impl),
            *streams,
            vk.put_segments([off(stream) for stream in streams], layout, STREAMS, impl=impl),
            vk.put_segments(off(streams[0]), layout, STREAMS[0], impl=impl),
            vk.take_rows(packed, positions, layout.num_tokens + 3, impl=impl),
        ]
    return results["cuda"], results["reference"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.int32, torch.int64, torch.float64])
@pytest.mark.parametrize("trailing", [(), (1,), (3,), (4, 4), (5, 7), (130,)])
def test_any_dtype_and_any_trailing_shape(trailing, dtype):
    torch.manual_seed(0)
    with poisoned_memory():
        found, expected = moved(vk.SegmentLayout(LENGTHS, capacity=33), trailing, dtype)
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == true.dtype and torch.equal(mine, true)


@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_views_that_begin_off_a_boundary(dtype, shift):
    found, expected = moved(vk.SegmentLayout(LENGTHS, capacity=33), (24,), dtype, shift)
    for mine, true in zip(found, expected, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("seed", range(6))
def test_any_layout_in_any_order_of_threads(emulator, seed):
    """Among them layouts without a row, and samples taken on the device."""
    torch.manual_seed(seed)
    lengths = torch.randint(0, 12, (seed * 9, 3)) * (torch.rand(seed * 9, 3) < 0.6)
    layout = vk.SegmentLayout(lengths, capacity=int(lengths.sum()) + 7 * (seed % 2))
    if seed > 2:
        layout = layout.take(torch.randint(0, len(lengths), (11,)))
    emulator.shuffle(seed)
    found, expected = moved(layout, (6,), torch.bfloat16)
    for mine, true in zip(found, expected, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(40, 24), (40, 7), (40, 2, 300), (3000, 8)], ids=str)
def test_sums_of_repeated_positions(emulator, shape, dtype):
    """In the order of the positions: the bits of a loop that adds one gradient after another."""
    torch.manual_seed(0)
    positions = torch.randint(-1, shape[0] // 4, (500,), dtype=dtype)
    positions[::3] = 7
    x, grad = torch.zeros(shape, requires_grad=True), torch.randn(510, *shape[1:])
    expected = torch.zeros(shape)
    for row, position in zip(grad, positions.tolist()):
        if position >= 0:
            expected[position] += row
    for seed in (0, 5):
        emulator.shuffle(seed)
        with poisoned_memory():
            (found,) = torch.autograd.grad(vk.take_rows(x, positions, 510, impl="cuda"), x, grad)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 31, 256, 520, 771])
def test_means_of_any_width(emulator, width, dtype):
    layout = vk.SegmentLayout([[40, 1], [0, 17], [3, 0], [129, 2]], capacity=200)
    x = torch.randn(200, width).to(dtype).requires_grad_()
    cotangent = torch.randn(4, width).to(dtype)
    for segment in (0, 1):
        mean, truth = (vk.segment_mean(x.to(d), layout, segment, impl=i) for d, i in ((dtype, "cuda"), (torch.float64, "reference")))
        torch.testing.assert_close(mean, truth.to(dtype))
        with poisoned_memory():
            (found,) = torch.autograd.grad(mean, x, cotangent, retain_graph=True)
        (expected,) = torch.autograd.grad(truth, x, cotangent.double())
        torch.testing.assert_close(found, expected)
        emulator.shuffle(3)
        assert torch.equal(vk.segment_mean(x, layout, segment, impl="cuda"), mean)
        assert torch.equal(torch.autograd.grad(mean, x, cotangent)[0], found)
        emulator.run_in_order()


@pytest.mark.parametrize("row", [(), (4,), (136,)], ids=str)
def test_more_rows_than_the_grid_takes_at_once(emulator, row):
    """A team of threads takes rows in turns, and asks where they come from when those of a segment are over."""
    torch.manual_seed(0)
    plan = emulator.copy_plan(2**20, 2 * torch.Size(row).numel(), 2 if not row else 8 if row == (4,) else 16)
    rows = 5 * 2112 * plan["rows_at_once"] // 2
    ends = torch.randint(1, rows, (200,)).sort().values
    lengths = torch.diff(torch.cat([torch.tensor([0]), ends])).view(100, 2)
    layout = vk.SegmentLayout(lengths, capacity=rows)
    x = torch.randn(rows, *row).bfloat16()
    text, image = vk.take_segments(x, layout, ((0,), (1,)), impl="cuda")
    segment = layout.token_segment()
    assert torch.equal(text, x[segment == 0]) and torch.equal(image, x[segment == 1])
    joined = vk.put_segments((text, image), layout, ((0,), (1,)), impl="cuda")
    nobody = (segment < 0).view(-1, *[1] * len(row))
    assert torch.equal(joined, x.masked_fill(nobody, 0))


def test_backward_twice():
    layout = vk.SegmentLayout(LENGTHS)
    x = torch.randn(layout.num_tokens, 40, requires_grad=True)
    text, image = vk.take_segments(x, layout, STREAMS, impl="cuda")
    rows = vk.take_rows(x, torch.tensor([3, 3, 0]), impl="cuda")
    loss = text.square().sum() + image.sum() + rows.square().sum() + vk.segment_mean(x, layout, 1, impl="cuda").square().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_nobodys_is_never_read():
    layout = vk.SegmentLayout(LENGTHS, capacity=40)
    padded = [torch.full((5, width, 3), torch.nan) for width in (8, 7, 9)]
    for tensor, lengths in zip(padded, layout.lengths.T):
        for b, length in enumerate(lengths.tolist()):
            tensor[b, :length] = b
        tensor.requires_grad_()
    packed = vk.pack(padded, layout, impl="cuda")
    assert packed.isfinite().all() and not packed[28:].any()
    cotangent = torch.ones_like(packed)
    cotangent[28:] = torch.nan
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(packed, padded, cotangent))


def test_a_layout_that_lies_about_its_rows_gives_zeros():
    """On a card the layout is not looked at before; a row outside of its tensor is not read."""
    x = torch.ones(9, 4)
    starts, lengths = (torch.tensor(rows, dtype=torch.int32) for rows in ([[0], [6]], [[6], [9]]))
    (part,) = emulated_packing.split_segments(x, [0], None, starts, lengths, [7])
    assert torch.equal(part.sum((1, 2)), torch.tensor([24.0, 12.0]))
    packed = emulated_packing.join_segments([torch.ones(2, 3, 4)], [0], None, starts, lengths, 12)
    assert torch.equal(packed[:, 0], torch.tensor([1.0] * 3 + [0.0] * 3 + [1.0] * 3 + [0.0] * 3))
    assert torch.equal(emulated_packing.take_rows(x, torch.tensor([8, 9, -3]), 3)[:, 0], torch.tensor([1.0, 0.0, 0.0]))


def test_empty_calls():
    check_empty_calls("cuda")


def test_the_emulator_is_what_serves(monkeypatch):
    layout, tensors = vk.SegmentLayout([[2, 1]]), (torch.randn(1, 2, 4), torch.randn(1, 1, 4))
    with dispatch.recorded() as served:
        vk.pack(tensors, layout)
    assert served == [("pack", "cuda")]
    monkeypatch.setattr(emulated_packing, "kernels", lambda: pytest.fail("called"))
    with pytest.raises(pytest.fail.Exception, match="called"):
        vk.pack(tensors, layout)


def sparse(*shape, dtype):
    """Zeros that take no memory before they are written."""
    numel = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * torch.empty(0, dtype=dtype).element_size(), flags=flags), dtype=dtype).view(shape)


def blocks_of_the_last_row(emulator, rows, row_bytes):
    plan = emulator.copy_plan(rows, row_bytes, 16)
    block = (rows - 1) // plan["rows_per_block"]
    assert plan["column_blocks"] == 1 and plan["rows_per_block"] > plan["rows_at_once"]
    return block, block + 1


def test_more_elements_than_31_bits_count(emulator):
    """The last block of every kernel, whose rows lie behind 2**31 elements in what is read and what is written."""
    width, samples, longest = 1024, 300, 7000
    rows = samples * longest
    assert rows * width > 2**31
    x, part = sparse(rows, width, dtype=torch.bfloat16), sparse(samples, longest, width, dtype=torch.bfloat16)
    layout = vk.SegmentLayout.padded([longest] * (samples - 1) + [longest - 2], longest)
    x[-3:], part[-1, -3:] = torch.randn(2, 3, width).unbind()
    emulator.only_blocks(*blocks_of_the_last_row(emulator, rows, 2 * width))
    packed = sparse(rows, width, dtype=torch.bfloat16)
    call = emulated_packing.moved(packed, [part], [0], None, layout.starts, layout.lengths)
    emulator.join_segments(call)
    assert torch.equal(packed[-3], part[-1, -3]) and not packed[-2:].any()
    split = sparse(samples, longest, width, dtype=torch.bfloat16)
    emulator.split_segments(emulated_packing.moved(x, [split], [0], None, layout.starts, layout.lengths))
    assert torch.equal(split[-1, -3], x[-3]) and not split[-1, -2:].any()


def test_rows_taken_from_and_into_more_than_31_bits_count(emulator):
    width, rows = 1024, 2**21 + 5
    x, out = sparse(rows, width, dtype=torch.bfloat16), sparse(rows, width, dtype=torch.bfloat16)
    x[-1] = torch.randn(width)
    positions = torch.full((rows,), -1, dtype=torch.int32)
    positions[-2:] = rows - 1
    emulator.only_blocks(*blocks_of_the_last_row(emulator, rows, 2 * width))
    given = emulated.fields(
        x=x, x_rows=rows, out=out, rows=rows, row_bytes=2 * width, positions=positions, is_wide=False, count=rows
    )
    emulator.take_rows(given)
    assert torch.equal(out[-1], x[-1]) and torch.equal(out[-2], x[-1]) and not out[-3].any()
    ordered, order = torch.sort(positions, stable=True)
    back = emulated.fields(
        dtype=x.dtype, width=width, grad=out, out=x, rows=rows, positions=ordered, is_wide=False, count=rows, order=order
    )
    expected = out[-1].float() * 2
    emulator.take_rows_backward(back)
    assert torch.equal(x[-1].float(), expected)


def test_means_behind_31_bits(emulator):
    width, rows = 1024, 2**21 + 5
    x = sparse(rows, width, dtype=torch.bfloat16)
    x[-4:] = torch.randn(4, width)
    starts, lengths = torch.tensor([[0], [rows - 4]], dtype=torch.int32), torch.tensor([[5], [4]], dtype=torch.int32)
    mean = emulated_packing.mean_segment(x, starts, lengths, 0)
    torch.testing.assert_close(mean[1], x[-4:].float().mean(0).bfloat16())
    assert not mean[0].any()
    emulator.only_blocks(*blocks_of_the_last_row(emulator, rows, 2 * width))
    grad, out = torch.randn(2, width).bfloat16(), sparse(rows, width, dtype=torch.bfloat16)
    emulator.mean_segment_backward(emulated_packing.mean_fields(grad, starts, lengths, 0, rows) | emulated.fields(grad=grad, out=out))
    assert torch.equal(out[-1].float(), grad[1].float() / 4) and torch.equal(out[-4], out[-1]) and not out[-5].any()


def test_the_plan():
    """Rows of 1,536 bytes by a warp; ids by a thread each; few rows spread over blocks, many take turns; long rows shared."""
    plan = emulated_packing.kernels().copy_plan
    assert plan(8192, 1536, 16)["blocks"] == 1024 and plan(8192, 1536, 16)["threads"] == 32
    assert plan(8192, 8, 8)["threads"] == 1 and plan(8192, 8, 8)["blocks"] == 32
    many = plan(2**20, 1536, 16)
    assert many["blocks"] <= 2112 and many["rows_per_block"] * many["blocks"] >= 2**20
    assert plan(2, 2**20, 16)["column_blocks"] == 512
    assert plan(0, 1536, 16)["blocks"] == plan(5, 0, 16)["blocks"] == 0
