"""Tiles of similarities and their weights in memory, interpreted: ragged ends, any width, rows a stride apart."""

import pytest
import torch
import triton
import triton.language as tl

from vlkernels.core import similarity
from vlkernels.core.triton_similarity import similarity_tile, store_weights, tile_of_wave


@triton.jit
def weigh_kernel(
    x, y, weights, x_stride, y_stride, stride, rows, columns, first_row, first_column, end_row, end_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, column = tile_of_wave(tl.program_id(0), first_row, first_column, end_column, ROWS, COLUMNS)
    tile = similarity_tile(x, y, row, column, rows, columns, x_stride, y_stride, ROWS, COLUMNS, DEPTH, WIDTH)
    store_weights(weights, stride, tile, row, column, first_row, first_column, end_row, end_column, ROWS, COLUMNS)


@pytest.mark.parametrize("dtype", similarity.DTYPES)
@pytest.mark.parametrize("rows, columns, width", ((1, 1, 8), (63, 129, 24), (130, 65, 80), (257, 64, 128)))
def test_every_similarity_lands_in_its_place(monkeypatch, dtype, rows, columns, width):
    monkeypatch.setattr(similarity, "WAVE_ROWS", 128)
    monkeypatch.setattr(similarity, "WHOLE_TILES", 64)
    monkeypatch.setattr(similarity, "WORKSPACE_BYTES", 128 * 64 * dtype.itemsize)
    sizes = similarity.tile_sizes(dtype, width, 90)
    around = torch.full((max(rows, columns) + 2, width + 5), torch.nan, dtype=dtype)  # reading past an end would show
    x, y = around.clone()[1 : rows + 1, :width], around.clone()[1 : columns + 1, :width]
    x.normal_(), y.normal_()
    found = torch.full((rows, columns), torch.nan)
    for wave in similarity.waves(rows, columns, x):
        launched = (wave.rows.start, wave.columns.start, wave.rows.stop, wave.columns.stop)
        weigh_kernel[(wave.programs(sizes),)](
            x, y, wave.weights, x.stride(0), y.stride(0), wave.weights.stride(0), rows, columns, *launched,
            sizes.rows, sizes.columns, sizes.depth, width,
        )  # fmt: skip
        found[wave.rows, wave.columns] = wave.weights.float()
    exact = x.double() @ y.double().T
    rounded = torch.finfo(torch.float32).eps * width + torch.finfo(dtype).eps * exact.abs()
    assert ((found - exact).abs() <= rounded).all()
