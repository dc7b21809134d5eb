"""The CUDA kernels of embed_layer_norm in the emulator, called as ``csrc/binding/embed_layer_norm.cpp`` calls them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import emulated
from tests.emulated import CSRC, fields
from vlkernels.ops.embed_layer_norm import functional


def kernels() -> ModuleType:
    return emulated.module(CSRC / "emulator" / "embed_layer_norm.cpp")


def _sum(
    rows: int,
    width: int,
    ids: Tensor | None,
    tables: list[Tensor],
    dense: Tensor | None,
    weight: Tensor | None,
    norm_ids: Tensor | None,
) -> dict[str, Any]:
    return fields(
        dtype=(tables[0] if dense is None else dense).dtype, width=width, rows=rows, ids=ids,
        wide_ids=ids is not None and ids.dtype == torch.int64, tables=[t.data_ptr() for t in tables],
        table_rows=[t.shape[0] for t in tables], dense=dense, norm_ids=norm_ids,
        wide_norm_ids=norm_ids is not None and norm_ids.dtype == torch.int64,
        norms=1 if norm_ids is None else weight.shape[0],
    )  # fmt: skip


def forward(ids, tables, dense, weight, bias, norm_ids, rng_state, keys, stream, threshold, eps) -> tuple[Tensor, ...]:
    like, rows = tables[0] if dense is None else dense, (ids if dense is None else dense).shape[0]
    width = like.shape[1]
    y, mean, rstd = like.new_empty(rows, width), torch.empty(rows), torch.empty(rows)
    kernels().forward(
        _sum(rows, width, ids, tables, dense, weight, norm_ids)
        | fields(
            eps=eps, weight=(weight,), bias=(bias,), rng_state=rng_state, keys=keys, stream=stream, threshold=threshold, y=y,
            mean=mean, rstd=rstd,
        )
    )  # fmt: skip
    return y, mean, rstd


def backward(
    dy, mean, rstd, ids, tables, dense, weight, bias, norm_ids, rng_state, keys, stream, threshold
) -> tuple[Tensor, ...]:
    rows, width = dy.shape
    dz = torch.empty_like(dy)
    dweight, dbias = (None if p is None else torch.empty_like(p) for p in (weight, bias))
    call = _sum(rows, width, ids, tables, dense, weight, norm_ids) | fields(
        dtype=dy.dtype, dy=dy, mean=mean, rstd=rstd, weight=(weight,), rng_state=rng_state, keys=keys, stream=stream,
        threshold=threshold, dz=dz, dweight=(dweight,), dbias=(dbias,),
    )  # fmt: skip
    partials = torch.full((kernels().partial_rows(call), 2, call["norms"] * width), float("nan"))
    kernels().backward(call | fields(partials=partials))
    return dz, *(mean.new_empty(0) if g is None else g for g in (dweight, dbias))


def tables_backward(gradient: Tensor, ids: Tensor, columns: list[int], table_rows: list[int]) -> list[Tensor]:
    tables = [gradient.new_empty(rows, gradient.shape[1]) for rows in table_rows]
    call = fields(
        dtype=gradient.dtype, tokens=gradient.shape[0], width=gradient.shape[1], id_stride=ids.shape[1], ids=ids,
        wide_ids=ids.dtype == torch.int64, gradient=gradient, columns=list(columns), table_rows=list(table_rows),
        tables=[t.data_ptr() for t in tables],
    )  # fmt: skip
    integers, floats = kernels().table_workspace(call)
    workspace = torch.full((integers,), -(2**30), dtype=torch.int32), torch.full((floats,), float("nan"))
    kernels().table_gradients(call | fields(integers=workspace[0], partials=workspace[1]))
    return tables


def serving(monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    """``impl="cuda"`` of embed_layer_norm serves CPU tensors inside the block."""
    raw = {
        "embed_layer_norm_forward": forward,
        "embed_layer_norm_backward": backward,
        "embed_layer_norm_tables_backward": tables_backward,
    }
    return emulated.serving(monkeypatch, functional, raw)
