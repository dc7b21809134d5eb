"""The ops under ``torch.ops.vlkernels`` that packing is made of: two linear maps, their adjoints, and a mean.

*Parts* hold the segments of a packed tensor separately: part ``part_of[s]`` holds segment ``s``, -1 leaves it
out. Without ``part_starts`` a part is padded, ``[B, T, ...]``; with it a part is packed, ``[rows, ...]``, and
segment ``s`` of sample ``b`` begins at its row ``part_starts[b, s]``. Joining and splitting are each other's
gradient.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlkernels.core import library


def _join_fake(
    parts: list[Tensor],
    part_of: list[int],
    part_starts: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    num_rows: int,
) -> Tensor:
    leading = 2 if part_starts is None else 1
    return parts[0].new_empty(num_rows, *parts[0].shape[leading:])


def _split_fake(
    x: Tensor,
    part_of: list[int],
    part_starts: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    part_rows: list[int],
) -> list[Tensor]:
    leading = (lengths.shape[0],) if part_starts is None else ()
    return [x.new_empty(*leading, rows, *x.shape[1:]) for rows in part_rows]


_join = library.define(
    "join_segments(Tensor[] parts, int[] part_of, Tensor? part_starts, "
    "Tensor starts, Tensor lengths, SymInt num_rows) -> Tensor",
    fake=_join_fake,
)
_split = library.define(
    "split_segments(Tensor x, int[] part_of, Tensor? part_starts, "
    "Tensor starts, Tensor lengths, SymInt[] part_rows) -> Tensor[]",
    fake=_split_fake,
)
_take = library.define(
    "take_rows(Tensor x, Tensor positions, SymInt num_rows) -> Tensor",
    fake=lambda x, positions, num_rows: x.new_empty(num_rows, *x.shape[1:]),
)
_take_back = library.define_backward(
    "take_rows_backward(Tensor grad, Tensor positions, SymInt num_rows) -> Tensor",
    fake=lambda grad, positions, num_rows: grad.new_empty(num_rows, *grad.shape[1:]),
)
_mean = library.define(
    "mean_segment(Tensor x, Tensor starts, Tensor lengths, int segment) -> Tensor",
    fake=lambda x, starts, lengths, segment: x.new_empty(lengths.shape[0], *x.shape[1:]),
)
_mean_back = library.define_backward(
    "mean_segment_backward(Tensor grad, Tensor starts, Tensor lengths, int segment, SymInt num_rows)"
    " -> Tensor",
    fake=lambda grad, starts, lengths, segment, num_rows: grad.new_empty(num_rows, *grad.shape[1:]),
)


def _save_join(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parts, part_of, part_starts, starts, lengths, _ = inputs
    ctx.part_of = part_of
    ctx.part_rows = [part.shape[1 if part_starts is None else 0] for part in parts]
    ctx.save_for_backward(part_starts, starts, lengths)


def _join_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[0]
    rows = [rows for rows, is_wanted in zip(ctx.part_rows, wanted) if is_wanted]
    found = iter(_split(grad.contiguous(), _renumbered(ctx.part_of, wanted), *ctx.saved_tensors, rows))
    return [next(found) if is_wanted else None for is_wanted in wanted], None, None, None, None, None


def _save_split(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, part_of, part_starts, starts, lengths, _ = inputs
    ctx.part_of = part_of
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(part_starts, starts, lengths)
    ctx.set_materialize_grads(False)  # a part nobody used is left out instead of joined as zeros


def _split_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    used = [grad is not None for grad in grads]
    parts = [grad.contiguous() for grad in grads if grad is not None]
    if not parts:
        return (None,) * 6
    grad = _join(parts, _renumbered(ctx.part_of, used), *ctx.saved_tensors, ctx.num_rows)
    return grad, None, None, None, None, None


def _renumbered(part_of: list[int], kept: list[bool]) -> list[int]:
    """``part_of`` when only the ``kept`` parts remain."""
    numbers = {part: number for number, part in enumerate(p for p, keep in enumerate(kept) if keep)}
    return [numbers.get(part, -1) for part in part_of]


def _save_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, positions, _ = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(positions)


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _take_back(grad.contiguous(), ctx.saved_tensors[0], ctx.num_rows), None, None


def _save_mean(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, starts, lengths, segment = inputs
    ctx.segment = segment
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(starts, lengths)


def _mean_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _mean_back(grad.contiguous(), *ctx.saved_tensors, ctx.segment, ctx.num_rows), None, None, None


join_segments = library.differentiable(_join, setup_context=_save_join, backward=_join_backward)
split_segments = library.differentiable(_split, setup_context=_save_split, backward=_split_backward)
take_rows = library.differentiable(_take, setup_context=_save_take, backward=_take_backward)
mean_segment = library.differentiable(_mean, setup_context=_save_mean, backward=_mean_backward)
