"""The repaired interpreter computes bfloat16 as a card does, and refuses what a card would do otherwise."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def cast_kernel(source, target, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_casts_round_to_nearest_even(source, target):
    halves = torch.arange(256) * 2**-8 + 1  # ties of bfloat16 and their neighbours
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.4e38, 1e-40, 65504.0])
    values = torch.cat([halves, special, torch.randn(2048 - 264)]).to(source)
    found = torch.empty(2048, dtype=target)
    cast_kernel[(1,)](values, found, 2048)
    torch.testing.assert_close(found, values.to(target), rtol=0, atol=0, equal_nan=True)


@triton.jit
def dot_kernel(a, b, c, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + row * SIZE + column), tl.trans(tl.load(b + row * SIZE + column)))
    tl.store(c + row * SIZE + column, product)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_values(dtype):
    a, b, c = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, 32)
    torch.testing.assert_close(c, (a.double() @ b.double().T).float(), rtol=1e-5, atol=1e-5)


@triton.jit
def raw_sum_kernel(x, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(x + index, tl.load(x + index) + tl.load(x + index))


def test_arithmetic_on_raw_bfloat16_is_refused():
    with pytest.raises(InterpreterError, match="convert them to float32 first"):
        raw_sum_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), 16)
    raw_sum_kernel[(1,)](torch.ones(16), 16)


@triton.jit
def loop_kernel(bounds, x):
    for step in range(0, tl.load(bounds)):
        tl.store(x + step, step)


def test_loop_bounds_may_be_loaded():
    found = torch.full((8,), -1, dtype=torch.int32)
    loop_kernel[(1,)](torch.tensor([5], dtype=torch.int32), found)
    assert found.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
