"""csrc/primitives/cpu_scalar.h rounds as PyTorch does, for every half value and around every tie."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCE = """
#define VLK_ISA baseline
#include "primitives/cpu_scalar.h"
using namespace vlk;
extern "C" void widen(int dtype, const void* from, float* to, long count) {
    baseline::visit(static_cast<Dtype>(dtype), [&](auto element) {
        for (long i = 0; i < count; ++i) to[i] = baseline::to_float(static_cast<const decltype(element)*>(from)[i]);
    });
}
extern "C" void narrow(int dtype, const float* from, void* to, long count) {
    baseline::visit(static_cast<Dtype>(dtype), [&](auto element) {
        using T = decltype(element);
        for (long i = 0; i < count; ++i) static_cast<T*>(to)[i] = baseline::from_float<T>(from[i]);
    });
}
"""
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def scalars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scalars")
    (folder / "scalars.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{CSRC}"]
    subprocess.run(["c++", *flags, folder / "scalars.cpp", "-o", folder / "scalars.so"], check=True)
    return ctypes.CDLL(str(folder / "scalars.so"))


def convert(function, dtype, source, target):
    pointers = (ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr()))
    function(CODES[dtype], *pointers, ctypes.c_long(source.numel()))
    return target


def bits(tensor):
    """The bit patterns, with one for every NaN."""
    view = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
    return torch.where(tensor.isnan(), torch.full_like(view, -1), view)


def every_value(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_exact(scalars, dtype):
    values = every_value(dtype)
    widened = convert(scalars.widen, dtype, values, torch.empty(values.numel()))
    assert torch.equal(bits(widened), bits(values.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_to_nearest_even(scalars, dtype):
    values = every_value(dtype).float()
    ties = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    near = [values, ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)]
    anything = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    source = torch.cat([*near, anything])
    narrowed = convert(scalars.narrow, dtype, source, torch.empty(source.numel(), dtype=dtype))
    assert torch.equal(bits(narrowed), bits(source.to(dtype)))
