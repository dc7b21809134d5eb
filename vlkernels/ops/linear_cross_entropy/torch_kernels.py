"""The linear cross-entropy over chunks of rows: never all logits, and gradients come with the value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vlkernels.ops.linear_cross_entropy.call import Call, saved_dtype

# Most logits of a chunk. On a CPU the memory counts, elsewhere the number of launches.
CPU_CHUNK_LOGITS, CHUNK_LOGITS = 2**23, 2**25
# Rows of logits begin so many elements apart, whole cache lines: MKL takes 1.4 times as long to write others.
ROW_ELEMENTS = 16
# Entries of the vocabulary whose gradients are added at once: a product and its sums stay in the second cache.
SLICE_ENTRIES = 1024

Gradients = tuple[Tensor, Tensor, Tensor]


def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of the sum by hidden, weight and bias, factor); gradients are empty when not wanted.

    ``factor`` is what the reduction multiplies the sum by. ``inputs`` are a :class:`Call`, then the reduction
    and whether gradients are wanted.
    """
    call, (reduction, gradient) = Call(*inputs[:-2]), inputs[-2:]
    live = _LiveRows(call)
    losses, *gradients = _visit(call, live, live.weights, gradient)
    factor = losses.new_ones(())
    if reduction == "mean":
        factor = live.count.to(losses.dtype).clamp_min(1).reciprocal()
    loss = live.put(losses) if reduction == "none" else losses.sum() * factor
    return loss, *gradients, factor


def backward(grad: Tensor, *inputs: Any) -> Gradients:
    """Gradients for one cotangent per row; the logits are computed once more."""
    call = Call(*inputs)
    live = _LiveRows(call)
    cotangents = live.take(grad.to(call.wide))
    if live.weights is not None:
        cotangents = cotangents * live.weights
    return _visit(call, live, cotangents, gradient=True)[1:]


class _LiveRows:
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
    call: Call, live: _LiveRows, cotangents: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of the live rows and the gradients of their sum, weighted by cotangents: chunk by chunk."""
    weight = call.weight.to(_product_dtype(call.hidden))
    inputs, goals = live.take(call.hidden).to(weight.dtype), live.take(call.targets).long()
    if live.weights is not None:
        goals = torch.where(live.weights > 0, goals, 0)
    teachers = None if call.teacher_hidden is None else live.take(call.teacher_hidden)
    chunks = _chunks(len(inputs), call)
    workspace = _Workspace(call, weight, chunks)
    value = torch.empty(len(inputs), dtype=call.wide, device=weight.device)
    sums = _Sums(call, inputs, weight, len(chunks)) if gradient else None
    for rows in chunks:
        logits = workspace.logits(inputs[rows], weight, call.bias)
        taught = None
        if teachers is not None:
            taught = workspace.taught(teachers[rows], call.teacher_weight, call.teacher_bias)
        scale = None if cotangents is None else cotangents[rows]
        value[rows] = _losses_and_slopes(call, logits, taught, goals[rows], scale)
        if sums is not None:
            sums.add(rows, logits, workspace.slopes(logits))
    if live.weights is not None:
        value = value * live.weights
    if sums is None:
        return value, *(value.new_empty(0) for _ in range(3))
    del workspace
    of_hidden = live.put(sums.of_hidden).to(saved_dtype(call.hidden))
    return value, of_hidden, sums.of_weight.to(saved_dtype(call.weight)), sums.of_bias


def _chunks(rows: int, call: Call) -> list[slice]:
    """As few chunks as memory allows, of about as many rows each."""
    logits = CPU_CHUNK_LOGITS if call.weight.device.type == "cpu" else CHUNK_LOGITS
    most = max(1, logits // len(call.weight))
    size = -(-rows // -(-rows // most)) if rows else 0
    return [slice(first, min(first + size, rows)) for first in range(0, rows, max(size, 1))]


class _Workspace:
    """The memory of a chunk: its logits in the wide dtype, and in that of the products if it is another."""

    def __init__(self, call: Call, weight: Tensor, chunks: list[slice]):
        rows, self._entries = (chunks[0].stop if chunks else 0), len(weight)
        padded = -(-self._entries // ROW_ELEMENTS) * ROW_ELEMENTS
        self._wide = weight.new_empty(rows, padded, dtype=call.wide)
        self._narrow = None if weight.dtype == call.wide else weight.new_empty(rows, padded)

    def logits(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits of so many rows, -inf past the last entry."""
        logits = self._wide[: len(inputs)]
        product = logits if self._narrow is None else self._narrow[: len(inputs)]
        _linear(inputs, weight, bias, product[:, : self._entries])
        if product is not logits:
            logits.copy_(product)
        logits[:, self._entries :] = -torch.inf
        return logits

    def taught(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits of the teacher, which lie in memory of their own."""
        out = inputs.new_empty(len(inputs), self._entries)
        return _linear(inputs, weight, bias, out).to(self._wide.dtype)

    def slopes(self, logits: Tensor) -> Tensor:
        """What :func:`_losses_and_slopes` left there, as it is multiplied."""
        slopes = logits if self._narrow is None else self._narrow[: len(logits)].copy_(logits)
        return slopes[:, : self._entries]


class _Sums:
    """The gradients of the sum: rows of hidden one chunk after the other, of weight and bias over all chunks."""

    def __init__(self, call: Call, inputs: Tensor, weight: Tensor, chunks: int):
        self._inputs, self._weight = inputs, weight
        self.of_hidden = torch.empty_like(inputs)
        # One chunk is one product; the sums of several would suffer in a half type.
        self.of_weight = weight.new_empty(weight.shape, dtype=weight.dtype if chunks == 1 else call.wide)
        self.of_bias = weight.new_zeros(0 if call.bias is None else len(weight), dtype=call.wide)
        if not chunks:
            self.of_weight.zero_()

    def add(self, rows: slice, wide: Tensor, slopes: Tensor) -> None:
        torch.mm(slopes, self._weight, out=self.of_hidden[rows])
        _add_product(self.of_weight, slopes.T, self._inputs[rows], is_first=rows.start == 0)
        if len(self.of_bias):
            self.of_bias += wide.sum(0)[: len(self.of_bias)]


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """``total += left right``, or ``=``: in the wide dtype whatever that of the factors."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if is_first else 1)
        return
    for part, rows in zip(total.split(SLICE_ENTRIES), left.split(SLICE_ENTRIES)):
        if is_first:
            part.copy_(rows @ right)
        else:
            part += rows @ right


def _losses_and_slopes(
    call: Call, padded: Tensor, taught: Tensor | None, goals: Tensor, cotangents: Tensor | None
) -> Tensor:
    """Losses of the rows of a chunk, whose logits turn into the gradient by them, times cotangents if any."""
    smoothing, distillation = call.label_smoothing, call.distillation
    logits = padded[:, : len(call.weight)]
    if taught is not None:
        soft_losses, soft_slopes = _soften(logits, taught, call.temperature)
    largest = padded.amax(1)
    losses = (1 - smoothing) * (largest - logits.gather(1, goals[:, None]).squeeze(1))
    if smoothing > 0:
        losses += smoothing * (largest - logits.mean(1))
    # Softmax writes an element after its row's reductions, so it may take the place of its input.
    torch.softmax(padded, dim=1, out=padded)
    # The largest probability is one over the sum of exponentials relative to the largest logit.
    log_total = -padded.amax(1).log()
    losses += log_total
    if taught is not None:
        losses = torch.lerp(losses, soft_losses, distillation)
    hard = 1 - distillation
    if call.z_loss > 0:
        lse = largest + log_total
        losses += call.z_loss * lse.square()
        padded *= (hard + 2 * call.z_loss * lse)[:, None]
    elif taught is not None:
        padded *= hard
    if smoothing > 0:
        padded -= hard * smoothing / logits.shape[1]
    at_goals = logits.new_full((len(goals), 1), -(1 - smoothing) * hard)
    logits.scatter_add_(1, goals[:, None], at_goals)
    if taught is not None:
        logits.add_(soft_slopes, alpha=distillation)
    if cotangents is not None:
        padded *= cotangents[:, None]
    return losses


def _soften(logits: Tensor, taught: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the teacher's softened distribution, times temperature squared, and its gradient."""
    log_probabilities = torch.log_softmax(logits / temperature, dim=1)
    goal = torch.softmax(taught / temperature, dim=1)
    losses = -(temperature**2) * (goal * log_probabilities).sum(1)
    return losses, log_probabilities.exp_().sub_(goal).mul_(temperature)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(inputs, weight.T, out=out)
    return torch.addmm(bias.to(weight.dtype), inputs, weight.T, out=out)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What is multiplied: float16 could not hold slopes of a mean over many rows."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
