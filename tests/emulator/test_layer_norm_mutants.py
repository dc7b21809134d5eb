"""Faults put into the CUDA sources, each of which a run in the emulator must show."""

import functools
import itertools

import pytest
import torch

from tests import emulated

pytestmark = pytest.mark.skipif(emulated.refusal() is not None, reason=str(emulated.refusal()))

# Only float32 and few shapes, so that a mutant compiles in seconds.
THINNER = [
    ("primitives/device_vector.cuh", "        case Dtype::bfloat16: return work(bfloat16{});\n", "        default: return;\n"),
    ("primitives/device_vector.cuh", "        case Dtype::float16: return work(float16{});\n", ""),
    ("primitives/row_plan.h", "int, 1, 2, 4, 6, 8>", "int, 6>"),
    ("primitives/row_plan.h", "int, 2, 8>", "int, 2>"),
]
MUTANTS = {
    "a dropped barrier": ("primitives/row_team.cuh", "        __syncthreads();\n", ""),
    "one buffer for two sums": ("primitives/row_team.cuh", "        half_ ^= 1;\n", ""),
    "a wrong shuffle mask": ("primitives/row_team.cuh", "whole_warp = 0xffffffffu", "whole_warp = 0x7fffffffu"),
    "a row that ends a vector late": ("primitives/held_row.cuh", "at[k] = column < width", "at[k] = column <= width"),
    "sums read before they are written": ("primitives/partial_rows.cuh", "    __syncthreads();\n    for", "    for"),
    "a column that a wide row leaves out": ("layer_norm/layer_norm_wide.cuh", "column < width;", "column < width - 1;"),
    "an RMSNorm that is centered": ("primitives/moments.cuh", "centered ?", "true ?"),
    "an RMSNorm's gradient that is centered": ("layer_norm/layer_norm.cuh", "means[0] = op.mean ?", "means[0] = true ?"),
    "a partial row left out": ("primitives/partial_rows.cuh", "row < op.count;", "row < op.count - 1;"),
}  # fmt: skip


def results(module, width, seed, centered):
    """The outputs and gradients of six rows, or the report of the emulator."""
    rows, generator = 6, torch.Generator().manual_seed(width)
    x, dy = torch.randn(2, rows, width, generator=generator)
    weight = torch.randn(width, generator=generator)
    y, dz, mean, rstd = torch.zeros(rows, width), torch.zeros(rows, width), torch.zeros(rows), torch.zeros(rows)
    dweight, dbias, partials = torch.zeros(width), torch.zeros(width) if centered else None, torch.zeros(rows, 3, width)
    call = emulated.fields(
        dtype=x.dtype, width=width, rows=rows, eps=1e-5, x=x, weight=(weight,), y=y,
        mean=mean if centered else None, rstd=rstd, dy=dy, dz=dz, dweight=(dweight,), dbias=(dbias,), partials=partials,
    )  # fmt: skip
    module.shuffle(seed)
    module.forward(call)
    module.backward(call | {"z": call["x"]})
    module.run_in_order()
    return x, dy, weight, (y, dz, dweight, dbias) if centered else (y, dz, dweight)


def is_right(module):
    """Rows of one warp, of several and not held, in two orders of the threads; LayerNorm and RMSNorm."""
    for width, seed, centered in itertools.product((760, 1512, 4101), (0, 1), (True, False)):
        try:
            x, dy, weight, found = results(module, width, seed, centered)
        except RuntimeError as report:
            assert "emulator: " in str(report)
            return False
        leaves = [t.double().requires_grad_() for t in (x, weight, torch.zeros(width))[: 3 if centered else 2]]
        norm = torch.nn.functional.layer_norm if centered else functools.partial(torch.nn.functional.rms_norm, eps=1e-5)
        y = norm(leaves[0], (width,), *leaves[1:])
        expected = (y, *torch.autograd.grad(y, leaves, dy.double()))
        if not all(torch.allclose(f.double(), e, rtol=1e-4, atol=1e-4) for f, e in zip(found, expected, strict=True)):
            return False
    return True


def test_the_sources_are_right_as_they_are(tmp_path):
    assert is_right(emulated.mutant("layer_norm", tmp_path / "csrc", THINNER))


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_fault_is_seen(fault, tmp_path):
    assert not is_right(emulated.mutant("layer_norm", tmp_path / "csrc", [*THINNER, MUTANTS[fault]]))
