"""The CUDA kernels of packing in the emulator, called as ``csrc/binding/packing_cuda.cpp`` calls them on a card."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import emulated
from tests.emulated import CSRC, fields
from vlkernels.ops.packing import functional


def kernels() -> ModuleType:
    return emulated.module(CSRC / "emulator" / "packing.cpp")


def row_bytes(x: Tensor, leading: int = 1) -> int:
    return x.element_size() * x.shape[leading:].numel()


def moved(packed, parts, part_of, part_starts, starts, lengths) -> dict[str, Any]:
    padded = part_starts is None
    return fields(
        starts=starts, lengths=lengths, samples=lengths.shape[0], per_sample=lengths.shape[1], packed=packed,
        packed_rows=packed.shape[0], row_bytes=row_bytes(packed), part_starts=part_starts, part_of=list(part_of),
        parts=[part.data_ptr() for part in parts], part_rows=[part.shape[1 if padded else 0] for part in parts],
    )  # fmt: skip


def join_segments(parts, part_of, part_starts, starts, lengths, num_rows) -> Tensor:
    leading = 2 if part_starts is None else 1
    packed = parts[0].new_empty(num_rows, *parts[0].shape[leading:])
    kernels().join_segments(moved(packed, parts, part_of, part_starts, starts, lengths))
    return packed


def split_segments(x, part_of, part_starts, starts, lengths, part_rows) -> list[Tensor]:
    leading = (lengths.shape[0],) if part_starts is None else ()
    parts = [x.new_empty(*leading, rows, *x.shape[1:]) for rows in part_rows]
    kernels().split_segments(moved(x, parts, part_of, part_starts, starts, lengths))
    return parts


def take_rows(x, positions, num_rows) -> Tensor:
    out = x.new_empty(num_rows, *x.shape[1:])
    kernels().take_rows(
        fields(
            x=x, x_rows=x.shape[0], out=out, rows=num_rows, row_bytes=row_bytes(x), positions=positions,
            is_wide=positions.dtype == torch.int64, count=positions.shape[0],
        )
    )  # fmt: skip
    return out


def take_rows_backward(grad, positions, num_rows) -> Tensor:
    ordered, order = torch.sort(positions, stable=True)
    out = grad.new_empty(num_rows, *grad.shape[1:])
    kernels().take_rows_backward(
        fields(
            dtype=grad.dtype, width=grad.shape[1:].numel(), grad=grad, out=out, rows=num_rows, positions=ordered,
            is_wide=ordered.dtype == torch.int64, count=ordered.shape[0], order=order,
        )
    )  # fmt: skip
    return out


def mean_fields(x, starts, lengths, segment, rows) -> dict[str, Any]:
    return fields(
        dtype=x.dtype, width=x.shape[1:].numel(), starts=starts, lengths=lengths, samples=lengths.shape[0],
        per_sample=lengths.shape[1], segment=segment, rows=rows,
    )  # fmt: skip


def mean_segment(x, starts, lengths, segment) -> Tensor:
    mean = x.new_empty(lengths.shape[0], *x.shape[1:])
    kernels().mean_segment(mean_fields(x, starts, lengths, segment, x.shape[0]) | fields(x=x, mean=mean))
    return mean


def mean_segment_backward(grad, starts, lengths, segment, num_rows) -> Tensor:
    out = grad.new_empty(num_rows, *grad.shape[1:])
    kernels().mean_segment_backward(mean_fields(grad, starts, lengths, segment, num_rows) | fields(grad=grad, out=out))
    return out


RAW_OPS = (join_segments, split_segments, take_rows, take_rows_backward, mean_segment, mean_segment_backward)


def serving(monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    """``impl="cuda"`` of packing serves CPU tensors inside the block."""
    return emulated.serving(monkeypatch, functional, {op.__name__: op for op in RAW_OPS})
