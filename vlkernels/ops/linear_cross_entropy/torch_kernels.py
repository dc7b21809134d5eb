"""impl "torch": the logits of a chunk in one place, a softmax there, and the library's products."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vlkernels.ops.linear_cross_entropy import driver
from vlkernels.ops.linear_cross_entropy.call import Call
from vlkernels.ops.linear_cross_entropy.driver import Rows, Sums

# Rows of logits begin so many elements apart, whole cache lines: MKL takes 1.4 times as long to write others.
ROW_ELEMENTS = 16


class TorchChunk:
    """Logits of a chunk in the wide dtype, and in that of the products if it is another."""

    def __init__(self, call: Call, weight: Tensor, most_rows: int):
        self._call, self._weight = call, weight
        padded = -(-len(weight) // ROW_ELEMENTS) * ROW_ELEMENTS
        self._wide = weight.new_empty(most_rows, padded, dtype=call.wide)
        self._narrow = None if weight.dtype == call.wide else weight.new_empty(most_rows, padded)

    def visit(self, rows: Rows, sums: Sums | None) -> Tensor:
        logits, taught = self._find_logits(rows.inputs), self._find_taught(rows.teacher)
        losses = _losses_and_slopes(self._call, logits, taught, rows.targets, rows.cotangents)
        if sums is not None:
            slopes = self._as_multiplied(logits)
            torch.mm(slopes, self._weight, out=sums.of_hidden[rows.span])
            sums.add_weight(rows, slopes.T)
            if len(sums.of_bias):
                sums.of_bias += logits.sum(0)[: len(self._weight)]
        return losses

    def _find_logits(self, inputs: Tensor) -> Tensor:
        """Logits of so many rows, -inf past the last entry."""
        logits = self._wide[: len(inputs)]
        product = logits if self._narrow is None else self._narrow[: len(inputs)]
        _linear(inputs, self._weight, self._call.bias, product[:, : len(self._weight)])
        if product is not logits:
            logits.copy_(product)
        logits[:, len(self._weight) :] = -torch.inf
        return logits

    def _find_taught(self, inputs: Tensor | None) -> Tensor | None:
        """Logits of the teacher, which lie in memory of their own."""
        if inputs is None:
            return None
        out = inputs.new_empty(len(inputs), len(self._weight))
        return _linear(inputs, self._call.teacher_weight, self._call.teacher_bias, out).to(self._wide.dtype)

    def _as_multiplied(self, logits: Tensor) -> Tensor:
        """What :func:`_losses_and_slopes` left there, in the dtype of the products."""
        slopes = logits if self._narrow is None else self._narrow[: len(logits)].copy_(logits)
        return slopes[:, : len(self._weight)]


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


forward, backward = partial(driver.forward, TorchChunk), partial(driver.backward, TorchChunk)
