"""The linear cross-entropy over chunks of rows: never all logits, and gradients come with the value."""

from __future__ import annotations

from collections.abc import Sequence
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradient of hidden, of weight, of bias), the gradients empty when not wanted."""
    problem = Problem(
        weight, bias, teacher_weight, teacher_bias, label_smoothing, z_loss, distillation, temperature
    )
    live = (targets != ignore_index).to(_wide(hidden))
    factor = live.sum().clamp_min(1).reciprocal() if reduction == "mean" else live.new_ones(())
    cotangents = live * factor
    losses, *gradients = _visit(
        problem, hidden, targets, teacher_hidden, live, cotangents if gradient else None
    )
    loss = losses if reduction == "none" else losses.sum() * factor
    return loss, *gradients


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
    live = (targets != ignore_index).to(_wide(hidden))
    return _visit(problem, hidden, targets, teacher_hidden, live, live * grad)[1:]


def _visit(
    problem: Problem,
    hidden: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor | None,
    live: Tensor,
    cotangents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of all rows and, with cotangents, the three gradients: one chunk of logits at a time."""
    weight = problem.weight.to(_product_dtype(hidden))
    losses = torch.zeros_like(live)
    of_hidden = torch.zeros_like(hidden, dtype=saved_dtype(hidden))
    of_bias = live.new_zeros(0 if problem.bias is None else len(problem.bias))
    of_weight: Tensor | None = None
    chunk = max(1, min(len(hidden), CHUNK_LOGITS // len(weight)))
    workspace = live.new_empty(chunk, len(weight))
    for rows in _chunks(live, chunk):
        inputs = hidden[rows].to(weight.dtype)
        logits = _logits(inputs, weight, problem.bias, workspace[: len(inputs)])
        taught = None
        if teacher_hidden is not None and problem.teacher_weight is not None:
            taught = _logits(
                teacher_hidden[rows], problem.teacher_weight, problem.teacher_bias, torch.empty_like(logits)
            )
        # Targets of ignored rows may be any number; their losses and cotangents are zero.
        wanted = torch.where(live[rows] > 0, targets[rows], 0).long()
        scale = None if cotangents is None else cotangents[rows]
        losses[rows] = _losses_and_slopes(problem, logits, taught, wanted, scale) * live[rows]
        if scale is not None:
            slopes = logits.to(weight.dtype)
            of_hidden[rows] = (slopes @ weight).to(of_hidden.dtype)
            of_weight = _add_product(of_weight, slopes.T, inputs, live.dtype)
            of_bias += logits.sum(0) if problem.bias is not None else 0
    if cotangents is None:
        return losses, *(losses.new_empty(0) for _ in range(3))
    if of_weight is None:
        of_weight = torch.zeros_like(weight)
    return losses, of_hidden, of_weight.to(saved_dtype(problem.weight)), of_bias


def _losses_and_slopes(
    problem: Problem, logits: Tensor, taught: Tensor | None, targets: Tensor, cotangents: Tensor | None
) -> Tensor:
    """Losses of the rows of a chunk; with cotangents its logits turn into the gradient by them."""
    smoothing, distillation = problem.label_smoothing, problem.distillation
    if taught is not None:
        soft_losses, soft_slopes = _soften(logits, taught, problem.temperature)
    largest = logits.amax(1)
    logits -= largest[:, None]
    losses = -(1 - smoothing) * logits.gather(1, targets[:, None]).squeeze(1)
    if smoothing > 0:
        losses -= smoothing * logits.mean(1)
    total = logits.exp_().sum(1)
    losses += total.log()
    lse = largest + total.log()
    if taught is not None:
        losses = torch.lerp(losses, soft_losses, distillation)
    losses += problem.z_loss * lse.square()
    if cotangents is None:
        return losses
    hard = (1 - distillation) * cotangents
    logits *= ((hard + 2 * problem.z_loss * lse * cotangents) / total)[:, None]
    if smoothing > 0:
        logits -= (hard * (smoothing / logits.shape[1]))[:, None]
    logits.scatter_add_(1, targets[:, None], -(1 - smoothing) * hard[:, None])
    if taught is not None:
        logits.addcmul_(soft_slopes, (distillation * cotangents)[:, None])
    return losses


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


def _chunks(live: Tensor, size: int) -> Sequence[Tensor | slice]:
    """Rows to visit: those that count, on a CPU; on a device all, because counting would wait for it."""
    if live.device.type == "cpu":
        rows = live.nonzero().squeeze(1)
        if len(rows) < len(live):
            return rows.split(size) if len(rows) else ()
    return [slice(first, first + size) for first in range(0, len(live), size)]


def saved_dtype(tensor: Tensor) -> torch.dtype:
    """What a gradient waits in for its cotangent: float16 could underflow before a loss scale arrives."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What is multiplied: float16 could not hold slopes of a mean over many rows."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
