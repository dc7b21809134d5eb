"""impl "triton" on the host: spans of queries, their blocks of keys, and both launches. Triton is imported by the first call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core import triton_runtime
from vlkernels.core.similarity import rows_of, tile_sizes
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.hard_negatives.reference import finite_max, pick, running_sums

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_BLOCKS = 2**22  # weights of blocks that are held at once: 16 MB
CHOICE_DEPTH, CHOICE_WARPS = 64, 4


class Span(NamedTuple):
    """Some queries, which are rows ``first ..`` of the concatenated batch, and all keys."""

    queries: Tensor
    keys: Tensor
    labels: Tensor | None
    scale: Tensor
    first: int

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.queries.stride(0), self.keys.stride(0), len(self.queries), len(self.keys), self.first


def refusal(facts: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot serve a call; ``None`` when they can."""
    if facts["dtype"] not in DTYPES:
        return f"it computes in float32, the features are {str(facts['dtype']).removeprefix('torch.')}"
    return None


def draw(queries: Tensor, keys: Tensor, scale: Tensor, first: int, labels: Tensor | None, draws: Tensor) -> Tensor:
    """One key for each query, -1 where there is none; see ``torch_kernels.Draw``."""
    queries, keys, architecture = rows_of(queries), rows_of(keys), triton_runtime.architecture(queries.device)
    sizes = tile_sizes(queries.dtype, queries.shape[1], architecture)
    blocks = -(-len(keys) // sizes.columns)
    drawn = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    # Whole tiles: a span then begins as well aligned as the queries do, or it would need kernels of its own.
    size = max(1, MOST_BLOCKS // blocks // sizes.rows) * sizes.rows
    with torch.cuda.device_of(queries):
        for start in range(0, len(queries), size):
            part = slice(start, start + size)
            span = Span(queries[part], keys, labels, scale, first + start)
            drawn[part] = _draw_span(span, draws[part], blocks, architecture)
    return drawn


def _draw_span(span: Span, draws: Tensor, blocks: int, architecture: int) -> Tensor:
    block_lse = torch.empty(len(span.queries), blocks, dtype=torch.float32, device=draws.device)
    block_launch(span, block_lse, architecture).run()
    weights = torch.exp(block_lse - finite_max(block_lse))
    cumulative, total = running_sums(weights), weights.sum(1)
    block = pick(weights, draws * total)[:, None]
    before, weight = (cumulative - weights).gather(1, block), weights.gather(1, block)
    threshold = (draws * total)[:, None].sub(before).div(weight)
    chosen = torch.empty(len(draws), dtype=torch.int64, device=draws.device)
    choose_launch(span, block, block_lse.gather(1, block), threshold, chosen, architecture).run()
    return torch.where(total > 0, chosen, -1)


def block_size(queries: Tensor, architecture: int) -> int:
    return tile_sizes(queries.dtype, queries.shape[1], architecture).columns


def block_launch(span: Span, block_lse: Tensor, architecture: int) -> Launch:
    width = span.queries.shape[1]
    sizes = tile_sizes(span.queries.dtype, width, architecture)
    arguments = (*span[:4], block_lse, *span.numbers)
    constants = {"ROWS": sizes.rows, "BLOCK": sizes.columns, "DEPTH": sizes.depth, "WIDTH": width}
    grid = (-(-len(span.queries) // sizes.rows) * block_lse.shape[1],)
    return Launch(_kernels().block_kernel, grid, arguments, constants, sizes.warps, sizes.stages)


def choose_launch(
    span: Span, block: Tensor, block_lse: Tensor, threshold: Tensor, chosen: Tensor, architecture: int
) -> Launch:
    arguments = (*span[:4], block, block_lse, threshold, chosen, *span.numbers)
    constants = {"BLOCK": block_size(span.queries, architecture), "DEPTH": CHOICE_DEPTH, "WIDTH": span.queries.shape[1]}
    return Launch(_kernels().choose_kernel, (len(span.queries),), arguments, constants, CHOICE_WARPS, stages=2)


def _kernels() -> Any:
    from vlkernels.ops.hard_negatives.gpu import kernels

    return kernels
