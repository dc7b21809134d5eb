"""The same in PyTorch, eager and compiled. No library was found that trains a sum of embeddings and its norm in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.peers import Prepared

EPS = 1e-12


def eager(
    ids: Tensor,
    tables: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    dropout_p: float = 0.0,
    norm_ids: Tensor | None = None,
    **_: Any,
) -> Prepared:
    """Plain PyTorch with its own dropout; several norms each on their own rows, then gathered into order."""

    def normed(terms: list[tuple[Tensor | None, Tensor]], weight: Tensor, bias: Tensor) -> Tensor:
        z = sum(table if column is None else F.embedding(column, table) for column, table in terms)
        return F.dropout(F.layer_norm(z, z.shape[1:], weight, bias, EPS), dropout_p)

    inputs = [*tables, weight, bias]
    if norm_ids is None:
        every = _terms(ids, tables)
        return Prepared(lambda: normed(every, weight, bias), inputs, inputs)
    rows = [(norm_ids == norm).nonzero().flatten() for norm in range(weight.shape[0])]
    order = torch.cat(rows).argsort()
    per_norm = [_terms(ids[chosen], tables) for chosen in rows]
    return Prepared(lambda: torch.cat(list(map(normed, per_norm, weight, bias))).index_select(0, order), inputs, inputs)


def _terms(ids: Tensor, tables: Sequence[Tensor]) -> list[tuple[Tensor | None, Tensor]]:
    """The tables these rows use, with their ids; without, where the rows are the table's as they stand."""
    terms = []
    for column, table in zip(ids.unbind(1), tables, strict=True):
        if torch.equal(column, torch.arange(len(table), device=column.device)):
            terms.append((None, table))
        elif (column >= 0).all():
            terms.append((column, table))
    return terms
