"""Triton's interpreter, repaired: runs the kernels on CPU tensors, program by program, so that any machine can prove them.

``TRITON_INTERPRET=1`` must be in the environment before ``triton`` is imported. As it comes, the interpreter keeps bfloat16 as
raw 16-bit integers: it multiplies and adds the bit patterns and cuts float32 instead of rounding it, without an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, InterpreterError, TensorHandle

from vlkernels.core import triton_runtime

QUIET_NAN = np.uint16(0x7FC0)


@functools.cache
def install() -> None:
    """Repair the interpreter of this process and let ``impl="triton"`` serve CPU tensors."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter is off: set TRITON_INTERPRET=1 before triton is imported")
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_dot = _dot
    for name in ("binary_op", "unary_op"):
        setattr(InterpreterBuilder, name, _refusing_bfloat16(name, getattr(InterpreterBuilder, name)))
    InterpretedFunction.__call__ = _call
    triton_interpreter._patch_lang_tensor = _with_index(triton_interpreter._patch_lang_tensor)
    triton_runtime.serve_interpreted()


def _call(function: InterpretedFunction, *arguments: Any, **options: Any) -> Any:
    """A device function. Triton patches its language again for each call; the launch has done so, and once will do."""
    if function.fn.__module__.startswith("triton."):
        _patch_own_module(function.fn.__module__, function)
    try:
        return function.rewrite()(*arguments, **options)
    except Exception as error:
        raise InterpreterError(repr(error)) from error


_patched: set[str] = set()


def _patch_own_module(name: str, function: InterpretedFunction) -> None:
    if name not in _patched:
        _patched.add(name)
        triton_interpreter._patch_lang(function.fn)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even, as a card does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), QUIET_NAN, rounded)


_original_cast = InterpreterBuilder.cast_impl


def _cast(builder: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
    before, after = source.dtype.scalar, target.scalar
    if before == after or tl.bfloat16 not in (before, after):
        return _original_cast(builder, source, target)
    values = _values(source).astype(np.float32)
    if after == tl.bfloat16:
        return TensorHandle(float32_to_bfloat16(values), after)
    return TensorHandle(values.astype(triton_interpreter._get_np_dtype(after)), after)


def _dot(
    builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, imprecise: Any
) -> TensorHandle:
    return TensorHandle(np.matmul(_values(a), _values(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _values(handle: TensorHandle) -> np.ndarray:
    return bfloat16_to_float32(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def _refusing_bfloat16(name: str, operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """A card widens bfloat16 by itself in some operations and not in others: kernels say ``.to(tl.float32)``."""

    def guarded(builder: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        if any(isinstance(a, TensorHandle) and a.dtype.scalar == tl.bfloat16 for a in arguments):
            raise TypeError(f"{name} on bfloat16 operands: convert them to float32 first")
        return operation(builder, *arguments)

    return guarded


def _with_index(patch: Callable[..., None]) -> Callable[..., None]:
    """Triton 3.6 keeps scalars as arrays of one element, which NumPy 2.4 no longer takes for an integer."""

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched
