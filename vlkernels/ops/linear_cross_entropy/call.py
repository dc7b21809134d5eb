"""What both directions of every implementation are given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """The tensors and options of the op; no teacher where ``teacher_hidden`` is ``None``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    distillation: float
    temperature: float

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits, losses and sums over rows."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


def saved_dtype(tensor: Tensor) -> torch.dtype:
    """What a gradient waits in for its cotangent: float16 could underflow before a loss scale arrives."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
