"""The definition of the sigmoid loss: the logit of every pair, plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core import pairs
from vlkernels.core.collectives import ProcessGroup, gather_rows
from vlkernels.core.products import outside_autocast


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float = 0.0,
    labels: Tensor | None = None,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
    rank_reduction: str = "mean",
) -> Tensor:
    rows = pairs.locate_pairs(image_features, group, rank_counts, impl="reference", labels=labels)
    images = pairs.of_all_ranks(image_features, rows, rank_reduction)
    texts = pairs.of_all_ranks(text_features, rows, rank_reduction)
    scale = pairs.held_by_all_ranks(logit_scale, images, rows, rank_reduction)
    bias = pairs.held_by_all_ranks(logit_bias, images, rows, rank_reduction)
    with outside_autocast(images):
        products = (scale * images) @ texts.T
    logits = products.to(pairs.wide(products)) + bias
    if labels is None:
        positive = torch.eye(rows.total, dtype=torch.bool, device=logits.device)
    else:
        every = gather_rows(labels, rows)
        positive = every[:, None] == every
    one = logits.new_ones(())
    signs = torch.where(positive, one, -one)
    return -F.logsigmoid(signs * logits).sum() / rows.total
