"""LayerNorm of a sum of embeddings, as its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.random import Rng, dropout_scale, keep_mask, resolve_rng


def embed_layer_norm(
    ids: Tensor | None,
    tables: Sequence[Tensor],
    weight: Tensor | None,
    *,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
    norm_ids: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    layout: SegmentLayout | None = None,
    rng: Rng | None = None,
    stream: int = 0,
) -> Tensor:
    dtype = (tables[0] if tables else dense).dtype
    wide = torch.promote_types(dtype, torch.float32)
    terms = [] if dense is None else [dense.to(wide)]
    for column, table in enumerate(tables):
        terms.append(_rows(table, ids[:, column].long()).to(wide))
    z = sum(terms[1:], terms[0])
    weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    if norm_ids is None:
        y = F.layer_norm(z, z.shape[1:], weight, bias, eps)
    else:
        y = _several_norms(z, weight, bias, norm_ids.long(), eps)
    if dropout_p > 0:
        y = torch.where(_kept(y, dropout_p, rng, stream, layout), y * dropout_scale(dropout_p), 0)
    return y.to(dtype)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of the table, zeros where the index is -1; a table of computed rows may have none."""
    readable = table if table.shape[0] else F.pad(table, (0, 0, 0, 1))
    return torch.where((index >= 0)[:, None], F.embedding(index.clamp(min=0), readable), 0)


def _several_norms(z: Tensor, weight: Tensor, bias: Tensor | None, norm_ids: Tensor, eps: float) -> Tensor:
    """Row t by norm ``norm_ids[t]``; zeros where that is -1."""
    chosen = norm_ids.clamp(min=0)
    y = F.layer_norm(z, z.shape[1:], eps=eps) * F.embedding(chosen, weight)
    if bias is not None:
        y = y + F.embedding(chosen, bias)
    return torch.where((norm_ids >= 0)[:, None], y, 0)


def _kept(y: Tensor, p: float, rng: Rng | None, stream: int, layout: SegmentLayout | None) -> Tensor:
    """bool, like ``y``: rows are keyed by the layout, or by (sample 0, their index)."""
    state = resolve_rng(rng, y.device)
    columns = torch.arange(y.shape[1], device=y.device)
    if layout is None:
        return keep_mask(state, stream, 0, torch.arange(y.shape[0], device=y.device)[:, None], columns, p)
    keys = layout.token_keys()
    return keep_mask(state, stream, keys[:, :1], keys[:, 1:], columns, p)
