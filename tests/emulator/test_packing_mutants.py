"""Faults put into the CUDA sources of packing, each of which a run in the emulator must show."""

import pytest
import torch

import vlkernels as vk
from tests import emulated
from tests.emulated import packing as emulated_packing

pytestmark = pytest.mark.skipif(emulated.refusal() is not None, reason=str(emulated.refusal()))

# Only float32, 16 bytes and single elements, so that a mutant compiles in seconds; a block's rows take turns.
THINNER = [
    ("primitives/row_copy_plan.h", "most_copy_blocks = 2112;", "most_copy_blocks = 1;"),
    ("primitives/device_vector.cuh", "        case Dtype::bfloat16: return work(bfloat16{});\n", "        default: return;\n"),
    ("primitives/device_vector.cuh", "        case Dtype::float16: return work(float16{});\n", ""),
    ("primitives/row_copy.cuh", "        case 8: return work(uint64_t{});\n", ""),
    ("primitives/row_copy.cuh", "        case 2: return work(uint16_t{});\n        case 1: return work(uint8_t{});\n", ""),
]
SEGMENTS, COPY = "primitives/segments.h", "primitives/row_copy.cuh"
PACKING, SUMS = "packing/packing.cuh", "packing/row_sums.cuh"
MUTANTS = {
    "a start that belongs to the segment before": (SEGMENTS, "at(middle) <= value", "at(middle) < value"),
    "a run that ends a row late": (PACKING, "to, row, row + from.count};", "to, row, row + from.count + 1};"),
    "a unit of a row left out": (COPY, "begin < units; begin", "begin < units - 1; begin"),
    "padding that is copied": (PACKING, "if (position >= length) return {-1, rows - position};", ""),
    "a repeated position left out": (SUMS, "last_at_most(sorted.count, row, at) + 1, to", "last_at_most(sorted.count, row, at), to"),
    "a dropped barrier": (SUMS, "= sum[k];\n        __syncthreads();", "= sum[k];"),
}  # fmt: skip


def results(width, impl):
    """What packing gives for a layout with empty segments and a tensor that goes on behind its rows, and gradients."""
    torch.manual_seed(width)
    layout = vk.SegmentLayout([[0, 3, 5], [1, 0, 4], [17, 0, 0], [0, 0, 0], [2, 12, 1]], capacity=48)
    padded = [torch.randn(5, longest, width) for longest in (18, 12, 5)]
    longer = torch.randn(60, width)
    x = longer[:48].requires_grad_()
    positions = torch.tensor([47, 4, 4, -1, 4, 9, 0])
    rows = vk.take_rows(x, positions, 8, impl=impl)
    mean = vk.segment_mean(x, layout, 1, impl=impl)
    streams = vk.take_segments(x, layout, ((2, 0), (1,)), impl=impl)
    outputs = [vk.pack(padded, layout, impl=impl), *vk.unpack(x, layout, (18, 13, 7), impl=impl), rows, mean, *streams]
    gradients = [torch.autograd.grad(t, x, torch.randn(t.shape))[0] for t in (rows, mean)]
    return [*outputs, *gradients, emulated_packing.take_rows(x.detach(), torch.tensor([48]), 1)]


def is_right(module, monkeypatch):
    """Rows of 16 bytes at once and of single elements, in two orders of the threads."""
    for width in (260, 3):
        expected = results(width, "reference")
        for seed in (0, 1):
            module.shuffle(seed)
            with monkeypatch.context() as patch:
                patch.setattr(emulated_packing, "kernels", lambda: module)
                with emulated_packing.serving(patch):
                    found = results(width, "cuda")
            if not all(torch.allclose(f, e, rtol=1e-5, atol=1e-5) for f, e in zip(found, expected, strict=True)):
                return False
    return True


def test_the_sources_are_right_as_they_are(tmp_path, monkeypatch):
    assert is_right(emulated.mutant("packing", tmp_path / "csrc", THINNER), monkeypatch)


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_fault_is_seen(fault, tmp_path, monkeypatch):
    assert not is_right(emulated.mutant("packing", tmp_path / "csrc", [*THINNER, MUTANTS[fault]]), monkeypatch)
