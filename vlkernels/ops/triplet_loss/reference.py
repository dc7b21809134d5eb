"""The definition of the triplet loss: the similarity of every pair, plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlkernels.core import pairs
from vlkernels.core.collectives import ProcessGroup, gather_rows
from vlkernels.core.products import outside_autocast


def triplet_loss(
    image_features: Tensor,
    text_features: Tensor,
    margin: float = 0.2,
    *,
    hardest: bool = True,
    labels: Tensor | None = None,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
    rank_reduction: str = "mean",
) -> Tensor:
    options = {"impl": "reference", "labels": labels, "hardest": hardest, "margin": margin}
    rows = pairs.locate_pairs(image_features, group, rank_counts, **options)
    images = pairs.of_all_ranks(image_features, rows, rank_reduction)
    texts = pairs.of_all_ranks(text_features, rows, rank_reduction)
    with outside_autocast(images):
        products = images @ texts.T
    similarities = products.to(pairs.wide(products))
    if labels is None:
        positive = torch.eye(rows.total, dtype=torch.bool, device=products.device)
    else:
        every = gather_rows(labels, rows)
        positive = every[:, None] == every
    partners = similarities.diagonal()
    negatives = similarities.masked_fill(positive, -torch.inf)
    if hardest:
        of_images, of_texts = negatives.max(1).values, negatives.max(0).values
    else:
        of_images, of_texts = negatives.T, negatives
    return ((of_images - partners + margin).relu() + (of_texts - partners + margin).relu()).sum()
