"""The definition of the contrastive loss: every similarity, both directions, plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core import pairs
from vlkernels.core.collectives import ProcessGroup, Rows, gather_rows, scale_gradient
from vlkernels.core.products import outside_autocast


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
    distillation: float = 0.0,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
    rank_reduction: str = "mean",
) -> Tensor:
    shares = {"distillation": distillation, "label_smoothing": label_smoothing}
    options = {"labels": labels, "rows in the queue": queue_length(image_features, image_keys)} | shares
    rows = pairs.locate_pairs(image_features, group, rank_counts, impl="reference", **options)
    images = _all_ranks(image_features, rows, rank_reduction)
    texts = _all_ranks(text_features, rows, rank_reduction)
    scale = _scale(logit_scale, images, rows, rank_reduction)
    if image_keys is None or text_keys is None:
        image_logits = _logits(images, texts, scale)
        all_labels = None if labels is None else gather_rows(labels, rows)
        losses = _cross_entropies(image_logits, all_labels, label_smoothing)
        losses = losses + _cross_entropies(image_logits.T, all_labels, label_smoothing)
        return losses / (2 * rows.total)
    all_image_keys, all_text_keys = gather_keys(image_keys, rows), gather_keys(text_keys, rows)
    all_labels = None if labels is None else gather_keys(labels, rows)
    losses = torch.zeros_like(scale, dtype=torch.promote_types(images.dtype, torch.float32))
    for queries, mine, opposite in (
        (images, all_image_keys, all_text_keys),
        (texts, all_text_keys, all_image_keys),
    ):
        taught = None
        if distillation > 0:
            taught = torch.softmax(_logits(mine[: rows.total], opposite, scale.detach()), dim=1)
        logits = _logits(queries, opposite, scale)
        losses = losses + _cross_entropies(logits, all_labels, label_smoothing, taught, distillation)
    return losses / (2 * rows.total)


def queue_length(features: Tensor, keys: Tensor | None) -> int | None:
    return None if keys is None else len(keys) - len(features)


def gather_keys(keys: Tensor, rows: Rows) -> Tensor:
    """The keys of the whole batch: every rank's own rows in rank order, then the queue all ranks share."""
    own = rows.counts[rows.rank]
    return torch.cat((gather_rows(keys[:own], rows), keys[own:].detach()))


def _logits(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    with outside_autocast(queries):
        products = (scale * queries) @ keys.T
    return products.to(torch.promote_types(products.dtype, torch.float32))


def _cross_entropies(
    logits: Tensor,
    labels: Tensor | None,
    label_smoothing: float,
    taught: Tensor | None = None,
    distillation: float = 0.0,
) -> Tensor:
    """Sum over rows of the cross-entropy with the positives and a share ``distillation`` of ``taught``."""
    targets = torch.arange(len(logits), device=logits.device)
    if labels is not None:
        equal = (labels[: len(logits), None] == labels[None, :]).to(logits.dtype)
        targets = equal / equal.sum(1, keepdim=True)
    if taught is not None:
        hard = (
            targets
            if labels is not None
            else torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device)
        )
        targets = distillation * taught + (1 - distillation) * hard
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


def _all_ranks(own: Tensor, rows: Rows, rank_reduction: str) -> Tensor:
    if rows.group is None:
        return own
    others = gather_rows(own, rows)
    factor = rows.world_size if rank_reduction == "mean" else 1
    return torch.cat((others[: rows.start], scale_gradient(own, factor), others[rows.stop :]))


def _scale(logit_scale: Tensor | float, like: Tensor, rows: Rows, rank_reduction: str) -> Tensor:
    """Every rank holds the whole gradient of the scale, which a mean leaves alone and a sum multiplies."""
    if not isinstance(logit_scale, Tensor):
        return torch.full(
            (), logit_scale, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
        )
    scale = logit_scale.reshape(())
    return scale_gradient(scale, 1 if rank_reduction == "mean" else 1 / rows.world_size)
