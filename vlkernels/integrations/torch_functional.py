"""``torch.nn.functional.linear_cross_entropy`` with its arguments, served by ``vk.linear_cross_entropy``."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops.linear_cross_entropy import linear_cross_entropy as fused


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    impl: str = "auto",
) -> Tensor:
    """PyTorch's value and gradients, in its dtype, without the logits of all rows.

    Class weights, probabilities as targets, losses of several dimensions and ``label_smoothing=1`` are PyTorch's own call
    (torch >= 2.13), which ``options`` belong to; the kernels here need none. One thing differs: a mean over targets that are
    all ignored is 0 here, with gradients 0, and NaN there.
    """
    ours = weight is None and not target.is_floating_point() and linear_weight.dim() == 2 and 0 <= label_smoothing < 1
    if not ours:
        return F.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing, options=options,
        )  # fmt: skip
    is_one_row = input.dim() == 1
    loss = fused(
        input[None] if is_one_row else input,
        linear_weight,
        target[None] if is_one_row else target,
        bias=linear_bias,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        impl=impl,
    )
    return (loss[0] if is_one_row and reduction == "none" else loss).to(input.dtype)
