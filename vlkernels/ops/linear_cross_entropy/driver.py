"""The linear cross-entropy over chunks of rows: never all logits, and gradients come with the value.

The logits of a chunk, their losses and derivatives are a :class:`Chunk`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlkernels.core.products import multiply
from vlkernels.ops.linear_cross_entropy.call import Call, saved_dtype

# Most logits of a chunk. On a CPU the memory counts, elsewhere the number of launches.
CPU_CHUNK_LOGITS, CHUNK_LOGITS = 2**23, 2**25
# Entries of the vocabulary whose gradients in a half type are added at once: a product and its sums stay in the second cache.
SLICE_ENTRIES = 1024

Gradients = tuple[Tensor, Tensor, Tensor]


class Rows(NamedTuple):
    """Some of the rows that count."""

    span: slice
    inputs: Tensor  # in the dtype of the products
    targets: Tensor
    teacher: Tensor | None
    cotangents: Tensor | None  # None: all are 1


class Sums:
    """The gradients of the sum: rows of hidden one chunk after the other, of weight and bias over all chunks."""

    def __init__(self, call: Call, inputs: Tensor, weight: Tensor, chunks: int):
        self.of_hidden = torch.empty_like(inputs)
        # One chunk is one product; the sums of several would suffer in a half type.
        self.of_weight = weight.new_empty(weight.shape, dtype=weight.dtype if chunks == 1 else call.wide)
        self.of_bias = weight.new_zeros(0 if call.bias is None else len(weight), dtype=call.wide)
        if not chunks:
            self.of_weight.zero_()

    def add_weight(self, rows: Rows, slopes: Tensor) -> None:
        """``slopes`` [V, rows] are the derivatives by the logits."""
        total, is_first = self.of_weight, rows.span.start == 0
        if slopes.dtype == total.dtype:
            multiply(slopes, rows.inputs, total, add=not is_first)
            return
        for part, some in zip(total.split(SLICE_ENTRIES), slopes.split(SLICE_ENTRIES)):
            if is_first:
                part.copy_(some @ rows.inputs)
            else:
                part += some @ rows.inputs


class Chunk(Protocol):
    """Memory for the logits of a chunk of rows; an object serves one call."""

    def visit(self, rows: Rows, sums: Sums | None) -> Tensor:
        """Losses of the rows; the gradients of their sum, times the cotangents, go into ``sums``."""


MakeChunk = Callable[[Call, Tensor, int], Chunk]  # the call, weight in the dtype of the products, most rows


def forward(make_chunk: MakeChunk, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of the sum by hidden, weight and bias, factor); gradients are empty when not wanted.

    ``factor`` is what the reduction multiplies the sum by. ``inputs`` are a :class:`Call`, then the reduction
    and whether gradients are wanted.
    """
    call, (reduction, gradient) = Call(*inputs[:-2]), inputs[-2:]
    live = LiveRows(call)
    losses, *gradients = _visit(make_chunk, call, live, live.weights, gradient)
    factor = losses.new_ones(())
    if reduction == "mean":
        factor = live.count.to(losses.dtype).clamp_min(1).reciprocal()
    loss = live.put(losses) if reduction == "none" else losses.sum() * factor
    return loss, *gradients, factor


def backward(make_chunk: MakeChunk, grad: Tensor, *inputs: Any) -> Gradients:
    """Gradients for one cotangent per row; the logits are computed once more."""
    call = Call(*inputs)
    live = LiveRows(call)
    cotangents = live.take(grad.to(call.wide))
    if live.weights is not None:
        cotangents = cotangents * live.weights
    return _visit(make_chunk, call, live, cotangents, gradient=True)[1:]


class LiveRows:
    """The rows whose target counts. On a CPU the others are left out; on a device they stay, with weight 0,
    because counting them would wait for it."""

    def __init__(self, call: Call):
        live = call.targets != call.ignore_index
        self.length = len(live)
        self.count = live.sum()
        self.index: Tensor | None = None
        self.weights: Tensor | None = None
        if not _may_count(live):
            self.weights = live.to(call.wide)
        elif int(self.count) < self.length:
            self.index = live.nonzero().squeeze(1)

    def take(self, rows: Tensor) -> Tensor:
        return rows if self.index is None else rows[self.index]

    def put(self, taken: Tensor) -> Tensor:
        if self.index is None:
            return taken
        return taken.new_zeros(self.length, *taken.shape[1:]).index_copy_(0, self.index, taken)


def _may_count(targets: Tensor) -> bool:
    """Whether the host can know how many rows count without waiting for a device."""
    return targets.device.type == "cpu"


def _visit(
    make_chunk: MakeChunk, call: Call, live: LiveRows, cotangents: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of the live rows and the gradients of their sum, weighted by cotangents: chunk by chunk."""
    weight = call.weight.to(_product_dtype(call.hidden))
    inputs, targets = live.take(call.hidden).to(weight.dtype), live.take(call.targets).long()
    if live.weights is not None:
        targets = torch.where(live.weights > 0, targets, 0)
    teachers = None if call.teacher_hidden is None else live.take(call.teacher_hidden)
    spans = _chunks(len(inputs), call)
    chunk = make_chunk(call, weight, spans[0].stop if spans else 0)
    losses = torch.empty(len(inputs), dtype=call.wide, device=weight.device)
    sums = Sums(call, inputs, weight, len(spans)) if gradient else None
    for span in spans:
        of_rows = (None if rows is None else rows[span] for rows in (teachers, cotangents))
        losses[span] = chunk.visit(Rows(span, inputs[span], targets[span], *of_rows), sums)
    if live.weights is not None:
        losses = losses * live.weights
    if sums is None:
        return losses, *(losses.new_empty(0) for _ in range(3))
    del chunk
    of_hidden = live.put(sums.of_hidden).to(saved_dtype(call.hidden))
    return losses, of_hidden, sums.of_weight.to(saved_dtype(call.weight)), sums.of_bias


def _chunks(rows: int, call: Call) -> list[slice]:
    """As few chunks as memory allows, of about as many rows each."""
    logits = CPU_CHUNK_LOGITS if call.weight.device.type == "cpu" else CHUNK_LOGITS
    most = max(1, logits // len(call.weight))
    size = -(-rows // -(-rows // most)) if rows else 0
    return [slice(first, min(first + size, rows)) for first in range(0, rows, max(size, 1))]


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What is multiplied: float16 could not hold slopes of a mean over many rows."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
