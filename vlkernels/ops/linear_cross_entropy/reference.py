"""The definition of the linear cross-entropy: all logits at once, plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.products import outside_autocast

Teacher = tuple[Tensor, Tensor, Tensor | None]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    teacher: Teacher | None = None,
    distillation: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    live = targets != ignore_index
    logits = _logits(hidden, weight, bias)
    wanted = torch.where(live, targets, 0).long()
    losses = F.cross_entropy(logits, wanted, reduction="none", label_smoothing=label_smoothing)
    if teacher is not None:
        with torch.no_grad():
            taught = torch.softmax(_logits(*teacher) / temperature, dim=1)
        softened = F.cross_entropy(logits / temperature, taught, reduction="none")
        losses = torch.lerp(losses, temperature**2 * softened, distillation)
    if z_loss > 0:
        losses = losses + z_loss * logits.logsumexp(1).square()
    losses = torch.where(live, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / live.sum().clamp_min(1)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with outside_autocast(hidden):
        logits = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
