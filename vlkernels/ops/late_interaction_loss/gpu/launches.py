"""impl "triton" on the host: blocks of samples, their tiles of maxima, and every launch as a function of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.late_interaction_loss.gpu.tile_sizes import TileSizes, slot, tile_sizes
from vlkernels.ops.late_interaction_loss.tiles import place_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_UNIT = 2.0**14  # weights are at most two, and float16 ends at 65,504: this keeps the small ones


class Block(NamedTuple):
    """Some samples of one side, as the kernels read them."""

    tokens: Tensor  # [*, D], theirs and others'
    starts: Tensor  # int32 [b]
    lengths: Tensor  # int32 [b]
    offsets: Tensor  # int32 [b]: where a sample's tokens lie among those of these samples
    longest: int
    count: int  # of their tokens, at most
    samples: Tensor  # [b], their numbers in the batch of all ranks
    place: int  # no other block of its side has it


class Maxima(NamedTuple):
    """Of rows ``[I, J]`` and of columns ``[J, I]``: means of maxima; the places ``[J, rows]`` that rows chose in the columns'
    samples, and ``[I, columns]`` that columns chose.

    Of any two tokens: the largest similarity, and the places ``[I, J]`` of the row and of the column.
    """

    of_rows: Tensor
    of_columns: Tensor
    row_places: Tensor
    column_places: Tensor


def refusal(facts: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot serve a call; ``None`` when they can."""
    if facts["dtype"] not in DTYPES:
        return f"it computes in float32, the inputs are {str(facts['dtype']).removeprefix('torch.')}"
    return None


def empty_maxima(rows: Block, columns: Block, any_two: bool) -> Maxima:
    numbers, like = (len(rows.starts), len(columns.starts)), rows.starts
    in_rows, in_columns = (place_dtype(samples.longest) for samples in (rows, columns))
    if any_two:
        row_places, column_places = (like.new_empty(numbers, dtype=dtype) for dtype in (in_rows, in_columns))
    else:
        row_places = like.new_empty(numbers[1], rows.count, dtype=in_columns)
        column_places = like.new_empty(numbers[0], columns.count, dtype=in_rows)
    of_rows = like.new_empty(numbers, dtype=torch.float32)
    of_columns = of_rows.T if any_two else like.new_empty(numbers[::-1], dtype=torch.float32)
    return Maxima(of_rows, of_columns, row_places, column_places)


def maxima_launches(rows: Block, columns: Block, maxima: Maxima, any_two: bool, architecture: int) -> list[Launch]:
    """One visit of each tile; of means, where the samples of neither side fit into a tile, one for the maxima of either."""
    if any_two:
        of_rows, _, row_places, column_places = maxima
        arguments = (*_read(rows, columns), of_rows, row_places, column_places, *_numbers(rows, columns), rows.tokens.shape[1])
        return [_maxima_launch(_kernels().largest_kernel, rows, columns, arguments, architecture)]
    most = _sizes("maxima", rows, architecture).columns
    turned = Maxima(maxima.of_columns, maxima.of_rows, maxima.column_places, maxima.row_places)
    if columns.longest <= most:
        return [_mean_max_launch(rows, columns, maxima, architecture)]
    if rows.longest <= most:
        return [_mean_max_launch(columns, rows, turned, architecture)]
    return [
        _mean_max_launch(rows, columns, maxima, architecture),
        _mean_max_launch(columns, rows, turned, architecture),
    ]


def _mean_max_launch(rows: Block, columns: Block, maxima: Maxima, architecture: int) -> Launch:
    arguments = (*_read(rows, columns), *maxima, *_numbers(rows, columns), rows.count, columns.count, rows.tokens.shape[1])
    return _maxima_launch(_kernels().mean_max_kernel, rows, columns, arguments, architecture)


def gradient_launch(
    gradient: Tensor, own: Block, others: Block, by_own: Tensor, by_others: Tensor | None, own_places: Tensor,
    other_places: Tensor, architecture: int,
) -> Launch:  # fmt: skip
    """Add what maxima send to ``gradient``, of the tokens that the own samples lie in.

    Args:
        by_own: ``[own, others]`` weights of the own samples' means, or of both sides' for any two tokens.
        by_others: ``[others, own]`` weights of the others' means; ``None`` for any two tokens.
        own_places, other_places: as in :class:`Maxima`, the own samples being the rows.
    """
    sizes = _sizes("gradient", own, architecture)
    row_slot, row_group = slot(own.longest, sizes.rows)
    column_slot, _ = slot(others.longest, sizes.columns)
    row_chunks, column_chunks = -(-own.longest // row_slot), -(-others.longest // column_slot)
    width = gradient.shape[1]
    arguments = (
        gradient, *own[1:4], *others[:4], by_own, by_others, own_places, other_places, *_numbers(own, others), own.count,
        others.count, row_chunks, column_chunks,
    )  # fmt: skip
    constants = {
        **_slots(own, others, sizes),
        "WIDTH": width,
        "SLICE": sizes.depth,
        "UNIT": HALF_UNIT if own.tokens.dtype == torch.float16 else 1.0,
        "ANY_TWO": by_others is None,
    }
    grid = -(-len(own.starts) // row_group) * row_chunks * -(-width // sizes.depth)
    return Launch(_kernels().gradient_kernel, (grid,), arguments, constants, sizes.warps, sizes.stages)


# D goes to the kernels of maxima as a number beside the constant: a loop whose bound the compiler knows it unrolls, and the
# addresses of every turn fill the registers.
def _maxima_launch(kernel: Any, rows: Block, columns: Block, arguments: tuple[Any, ...], architecture: int) -> Launch:
    sizes = _sizes("maxima", rows, architecture)
    constants = {
        **_slots(rows, columns, sizes),
        "WIDTH": rows.tokens.shape[1],
        "DEPTH": sizes.depth,
        "PACKED": rows.tokens.dtype != torch.float32,
    }
    constants["LONG_ROWS"] = rows.longest > constants["ROW_SLOT"]
    constants["LONG_COLUMNS"] = columns.longest > constants["COLUMN_SLOT"]
    grid = -(-len(rows.starts) // constants["ROW_GROUP"]) * -(-len(columns.starts) // constants["COLUMN_GROUP"])
    return Launch(kernel, (grid,), arguments, constants, sizes.warps, sizes.stages)


def _slots(rows: Block, columns: Block, sizes: TileSizes) -> dict[str, int]:
    (row_slot, row_group), (column_slot, column_group) = slot(rows.longest, sizes.rows), slot(columns.longest, sizes.columns)
    return {"ROW_SLOT": row_slot, "ROW_GROUP": row_group, "COLUMN_SLOT": column_slot, "COLUMN_GROUP": column_group}


def _read(rows: Block, columns: Block) -> tuple[Tensor, ...]:
    found = (*rows[:4], *columns[:4])
    assert all(t.is_contiguous() for t in found), "the kernels read these tensors without strides"
    return found


def _numbers(rows: Block, columns: Block) -> tuple[int, int]:
    return len(rows.starts), len(columns.starts)


def _sizes(kernel: str, samples: Block, architecture: int) -> TileSizes:
    return tile_sizes(kernel, samples.tokens.dtype, samples.tokens.shape[1], architecture)


def _kernels() -> Any:
    from vlkernels.ops.late_interaction_loss.gpu import kernels

    return kernels
