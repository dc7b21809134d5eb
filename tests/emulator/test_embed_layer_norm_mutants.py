"""Faults put into the CUDA sources of embed_layer_norm, each of which a run in the emulator must show."""

import pytest
import torch

from tests import emulated

pytestmark = pytest.mark.skipif(emulated.refusal() is not None, reason=str(emulated.refusal()))

# Only float32 and few shapes, so that a mutant compiles in seconds.
THINNER = [
    ("primitives/device_vector.cuh", "        case Dtype::bfloat16: return work(bfloat16{});\n", "        default: return;\n"),
    ("primitives/device_vector.cuh", "        case Dtype::float16: return work(float16{});\n", ""),
    ("primitives/row_plan.h", "int, 1, 2, 4, 6, 8>", "int, 2>"),
    ("primitives/row_plan.h", "int, 2, 8>", "int, 2>"),
]
TABLES, SORT = "embed_layer_norm/table_gradients.cuh", "primitives/device_sort.cuh"
# Faults that give wrong numbers, and none that would write anywhere: the process goes on.
MUTANTS = {
    "equal keys in another order": (SORT, "earlier + __popc(below)", "earlier + __popc(equal) - 1 - __popc(below)"),
    "a chunk that ends early": (TABLES, "present ? begin + sums.chunk :", "present ? begin + sums.chunk - 1 :"),
    "a run that ends late": (TABLES, "static_cast<int>(behind < end ? behind : end)", "static_cast<int>(end)"),
    "a piece left out": (TABLES, "c <= last_chunk;", "c < last_chunk;"),
    "pieces added before they are there": (TABLES, "    __syncthreads();\n    if (threadIdx.y", "    if (threadIdx.y"),
    "rows summed for every norm behind theirs": ("embed_layer_norm/row_norms.cuh", "taken == norm ||", "taken <= norm ||"),
}  # fmt: skip


def backward_is_right(module):
    """Sixty rows of three norms, one of them nobody's."""
    rows, width, norms, generator = 60, 248, 2, torch.Generator().manual_seed(0)
    dense, dy = torch.randn(2, rows, width, generator=generator)
    weight, norm_ids = torch.randn(norms, width, generator=generator), torch.randint(-1, norms, (rows,), generator=generator)
    y, dz, mean, rstd = torch.zeros(rows, width), torch.full((rows, width), torch.nan), torch.zeros(rows), torch.zeros(rows)
    dweight = torch.zeros(norms, width)
    call = emulated.fields(
        dtype=dense.dtype, width=width, rows=rows, eps=1e-5, tables=[], table_rows=[], dense=dense, norm_ids=norm_ids,
        wide_norm_ids=True, norms=norms, weight=(weight,), y=y, mean=mean, rstd=rstd, dy=dy, dz=dz, dweight=(dweight,),
    )  # fmt: skip
    partials = torch.full((module.partial_rows(call), 2, norms * width), torch.nan)
    module.forward(call)
    module.backward(call | emulated.fields(partials=partials))
    leaves = [t.double().requires_grad_() for t in (dense, weight)]
    has_norm = (norm_ids >= 0)[:, None]
    expected = torch.nn.functional.layer_norm(leaves[0], (width,)) * leaves[1][norm_ids.clamp(min=0)] * has_norm
    expected = (expected, *torch.autograd.grad(expected, leaves, dy.double()))
    return all(torch.allclose(f.double(), e, rtol=1e-4, atol=1e-4) for f, e in zip((y, dz, dweight), expected))


def tables_are_right(module):
    """Rows of no token, of one, of more than a chunk; every sum in the order of the tokens to the last bit."""
    rows, width, generator = 400, 8, torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randint(low, high, (rows,), generator=generator) for low, high in ((-1, 260), (0, 2))], dim=1)
    ids[ids == 130] = 131
    ids[30:47, 0], ids[200:350, 0] = 130, 259
    gradient = torch.randn(rows, width, generator=generator)
    tables = [torch.full((size, width), torch.nan) for size in (260, 2)]
    call = emulated.fields(
        dtype=gradient.dtype, tokens=rows, width=width, id_stride=2, ids=ids, wide_ids=True, gradient=gradient, columns=[0, 1],
        table_rows=[260, 2], tables=[t.data_ptr() for t in tables],
    )  # fmt: skip
    integers, floats = module.table_workspace(call)
    workspace = torch.full((integers,), 0, dtype=torch.int32), torch.full((floats,), torch.nan)
    module.table_gradients(call | emulated.fields(integers=workspace[0], partials=workspace[1]))
    for column, table in enumerate(tables):
        expected = torch.zeros(table.shape, dtype=torch.float64).index_add_(
            0, ids[:, column].clamp(min=0), gradient.double() * (ids[:, column] >= 0)[:, None]
        )
        if not torch.allclose(table.double(), expected, rtol=1e-5, atol=1e-5):
            return False
    in_order = torch.zeros(width)
    for token in range(30, 47):
        in_order += gradient[token]
    return torch.equal(tables[0][130], in_order)


def is_right(module):
    for seed in (0, 1):
        module.shuffle(seed)
        try:
            if not (backward_is_right(module) and tables_are_right(module)):
                return False
        except RuntimeError as report:
            assert "emulator: " in str(report)
            return False
        finally:
            module.run_in_order()
    return True


def test_the_sources_are_right_as_they_are(tmp_path):
    assert is_right(emulated.mutant("embed_layer_norm", tmp_path / "csrc", THINNER))


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_fault_is_seen(fault, tmp_path):
    assert not is_right(emulated.mutant("embed_layer_norm", tmp_path / "csrc", [*THINNER, MUTANTS[fault]]))
