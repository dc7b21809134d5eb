"""Waves of weights: they cover every pair once, in a bounded workspace, and their products are the gradients."""

import pytest
import torch

from vlkernels.core import similarity
from vlkernels.core.similarity import WORKSPACE_BYTES, tile_sizes, wave_shape

SIZES = (1, 63, 257, 1000, 4096, 4097, 30_522, 65_536, 1_000_003)


@pytest.mark.parametrize("dtype", similarity.DTYPES)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("columns", SIZES)
def test_the_workspace_is_bounded_at_any_size(rows, columns, dtype):
    height, width = wave_shape(rows, columns, dtype.itemsize)
    stride = -(-width // similarity.STRIDE_UNIT) * similarity.STRIDE_UNIT
    assert height * stride * dtype.itemsize <= 1.01 * WORKSPACE_BYTES
    assert (height == rows or height % similarity.WHOLE_TILES == 0) and (width == columns or width % similarity.WHOLE_TILES == 0)
    needed = max(rows * columns * dtype.itemsize / WORKSPACE_BYTES, rows / similarity.WAVE_ROWS)
    assert -(-rows // height) * -(-columns // width) <= 3 * needed + 2, "the workspace is put to use"


@pytest.fixture
def small_waves(monkeypatch):
    monkeypatch.setattr(similarity, "WORKSPACE_BYTES", 4 * 8 * 12)
    monkeypatch.setattr(similarity, "WAVE_ROWS", 8)
    monkeypatch.setattr(similarity, "WHOLE_TILES", 4)


@pytest.mark.parametrize("dtype", similarity.DTYPES)
@pytest.mark.parametrize("rows, columns", ((1, 1), (7, 30), (21, 13), (0, 5), (5, 0)))
def test_gradients_are_those_of_the_whole_matrix(small_waves, dtype, rows, columns):
    x, y = torch.randn(rows, 6).to(dtype), torch.randn(columns, 6).to(dtype)
    weights = torch.randn(rows, columns).to(dtype)
    met = torch.zeros(rows, columns)

    def weigh(wave):
        met[wave.rows, wave.columns] += 1
        wave.weights.copy_(weights[wave.rows, wave.columns] * similarity.FACTOR[dtype])

    before = torch.randn(rows, 6), torch.randn(columns, 6)
    toward_x, toward_y = (t.clone() for t in before)
    similarity.differentiate(weigh, x, y, toward_x, toward_y)
    assert (met == 1).all()
    exact = weights.double()
    torch.testing.assert_close(toward_x, (before[0] + exact @ y.double()).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(toward_y, (before[1] + exact.T @ x.double()).float(), rtol=1e-4, atol=1e-5)
    for wanted in range(2):
        only = [t.clone() if k == wanted else None for k, t in enumerate(before)]
        similarity.differentiate(weigh, x, y, *only)
        assert torch.equal(only[wanted], (toward_x, toward_y)[wanted])


def test_small_float16_weights_survive():
    weights = torch.full((1, 64), 2.0**-26)  # of a batch of millions
    x, y, toward_x = torch.ones(1, 1).half(), torch.ones(64, 1).half(), torch.zeros(1, 1)
    factor = similarity.FACTOR[torch.float16]
    similarity.differentiate(lambda wave: wave.weights.copy_(weights * factor), x, y, toward_x, None)
    assert toward_x.item() == 2.0**-20


def test_tiles_follow_from_dtype_width_and_card_alone():
    assert tile_sizes(torch.bfloat16, 24, 90).depth == 32 and tile_sizes(torch.bfloat16, 8, 90).depth == 16
    assert tile_sizes(torch.bfloat16, 768, 90).depth == 64
    assert tile_sizes(torch.bfloat16, 512, 86).stages < tile_sizes(torch.bfloat16, 512, 90).stages
