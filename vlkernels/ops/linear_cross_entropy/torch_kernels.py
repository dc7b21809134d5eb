"""The linear cross-entropy over chunks of rows: never all logits, and gradients come with the value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_LOGITS = 2**25

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """Everything but the rows: the classifier, the teacher's, and what the loss is made of."""

    weight: Tensor
    bias: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    label_smoothing: float
    z_loss: float
    distillation: float
    temperature: float


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    distillation: float,
    temperature: float,
    reduction: str,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of the sum by hidden, weight and bias, factor); gradients are empty when not wanted.

    ``factor`` is what the reduction multiplies the sum by.
    """
    problem = Problem(
        weight, bias, teacher_weight, teacher_bias, label_smoothing, z_loss, distillation, temperature
    )
    live = _LiveRows(targets, ignore_index)
    losses, *gradients = _visit(problem, live, hidden, targets, teacher_hidden, live.weights, gradient)
    factor = losses.new_ones(())
    if reduction == "mean":
        factor = live.count.to(losses.dtype).clamp_min(1).reciprocal()
    loss = live.put(losses) if reduction == "none" else losses.sum() * factor
    return loss, *gradients, factor


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    distillation: float,
    temperature: float,
) -> Gradients:
    """Gradients for one cotangent per row; the logits are computed once more."""
    problem = Problem(
        weight, bias, teacher_weight, teacher_bias, label_smoothing, z_loss, distillation, temperature
    )
    live = _LiveRows(targets, ignore_index)
    cotangents = live.take(grad.to(_wide(hidden)))
    if live.weights is not None:
        cotangents = cotangents * live.weights
    return _visit(problem, live, hidden, targets, teacher_hidden, cotangents, gradient=True)[1:]


class _LiveRows:
    """The rows whose target counts. On a CPU the others are left out; on a device they stay, with weight 0,
    because counting them would wait for it."""

    def __init__(self, targets: Tensor, ignore_index: int):
        live = targets != ignore_index
        self.length = len(targets)
        self.count = live.sum()
        self.index: Tensor | None = None
        self.weights: Tensor | None = None
        if not _may_count(targets):
            self.weights = live.to(torch.float32)
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
    problem: Problem,
    live: _LiveRows,
    hidden: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor | None,
    cotangents: Tensor | None,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of the live rows and the gradients of their sum, weighted by cotangents: chunk by chunk."""
    weight = problem.weight.to(_product_dtype(hidden))
    inputs, goals = live.take(hidden).to(weight.dtype), live.take(targets).long()
    if live.weights is not None:
        goals = torch.where(live.weights > 0, goals, 0)
    teachers = None if teacher_hidden is None else live.take(teacher_hidden)
    size = max(1, min(len(inputs), CHUNK_LOGITS // len(weight)))
    workspace = hidden.new_empty(size, len(weight), dtype=_wide(hidden))
    losses: list[Tensor] = []
    of_inputs: list[Tensor] = []
    of_weight: Tensor | None = None
    of_bias = workspace.new_zeros(0 if problem.bias is None else len(problem.bias))
    for first in range(0, max(len(inputs), 1), size):
        rows = slice(first, first + size)
        logits = _logits(inputs[rows], weight, problem.bias, workspace[: len(inputs[rows])])
        taught = None
        if teachers is not None and problem.teacher_weight is not None:
            out = torch.empty_like(logits)
            taught = _logits(teachers[rows], problem.teacher_weight, problem.teacher_bias, out)
        scale = None if cotangents is None else cotangents[rows]
        losses.append(_losses_and_slopes(problem, logits, taught, goals[rows], scale))
        if gradient:
            slopes = logits.to(weight.dtype)
            of_inputs.append(slopes @ weight)
            of_weight = _add_product(of_weight, slopes.T, inputs[rows], workspace.dtype)
            of_bias += logits.sum(0) if problem.bias is not None else 0
    value = _join(losses)
    if live.weights is not None:
        value = value * live.weights
    if of_weight is None:
        return value, *(value.new_empty(0) for _ in range(3))
    of_hidden = live.put(_join(of_inputs)).to(saved_dtype(hidden))
    return value, of_hidden, of_weight.to(saved_dtype(problem.weight)), of_bias


def _losses_and_slopes(
    problem: Problem, logits: Tensor, taught: Tensor | None, goals: Tensor, cotangents: Tensor | None
) -> Tensor:
    """Losses of the rows of a chunk, whose logits turn into the gradient by them, times cotangents if any."""
    smoothing, distillation = problem.label_smoothing, problem.distillation
    if taught is not None:
        soft_losses, soft_slopes = _soften(logits, taught, problem.temperature)
    largest = logits.amax(1)
    losses = (1 - smoothing) * (largest - logits.gather(1, goals[:, None]).squeeze(1))
    if smoothing > 0:
        losses += smoothing * (largest - logits.mean(1))
    # Softmax writes an element after its row's reductions, so it may take the place of its input.
    torch.softmax(logits, dim=1, out=logits)
    # The largest probability is one over the sum of exponentials relative to the largest logit.
    log_total = -logits.amax(1).log()
    losses += log_total
    if taught is not None:
        losses = torch.lerp(losses, soft_losses, distillation)
    hard = 1 - distillation
    if problem.z_loss > 0:
        lse = largest + log_total
        losses += problem.z_loss * lse.square()
        logits *= (hard + 2 * problem.z_loss * lse)[:, None]
    elif taught is not None:
        logits *= hard
    if smoothing > 0:
        logits -= hard * smoothing / logits.shape[1]
    at_goals = logits.new_full((len(goals), 1), -(1 - smoothing) * hard)
    logits.scatter_add_(1, goals[:, None], at_goals)
    if taught is not None:
        logits.add_(soft_slopes, alpha=distillation)
    if cotangents is not None:
        logits *= cotangents[:, None]
    return losses


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _soften(logits: Tensor, taught: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the teacher's softened distribution, times temperature squared, and its gradient."""
    log_probabilities = torch.log_softmax(logits / temperature, dim=1)
    goal = torch.softmax(taught / temperature, dim=1)
    losses = -(temperature**2) * (goal * log_probabilities).sum(1)
    return losses, log_probabilities.exp_().sub_(goal).mul_(temperature)


def _logits(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if weight.dtype != out.dtype:
        return out.copy_(
            torch.nn.functional.linear(inputs, weight, None if bias is None else bias.to(weight.dtype))
        )
    if bias is None:
        return torch.mm(inputs, weight.T, out=out)
    return torch.addmm(bias.to(out.dtype), inputs, weight.T, out=out)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """``total + left right``: one chunk alone in the dtype of the product, several in the wide one."""
    if total is None:
        return left @ right
    if left.dtype == wide:
        return total.addmm_(left, right)
    return total.to(wide).add_(left @ right)


def saved_dtype(tensor: Tensor) -> torch.dtype:
    """What a gradient waits in for its cotangent: float16 could underflow before a loss scale arrives."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What is multiplied: float16 could not hold slopes of a mean over many rows."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
