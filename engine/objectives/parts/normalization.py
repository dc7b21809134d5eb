"""Factors on local sums, their precision, and the ranks that share negatives."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from engine.batch import Batch


def normalizer(batch: Batch, count: str) -> Tensor | float:
    """What a local sum over `count` is multiplied by: the trainer's factor, or this batch's own mean."""
    counted = batch.counts[count]
    return batch.normalizers.get(count, 1 / counted if counted else 0.0)


def widened(x: Tensor) -> Tensor:
    """In float32 at least: what a loss sums over all that is counted."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def negatives_group(negatives: str) -> dist.ProcessGroup | None:
    """All ranks for `global` negatives, none for `local` ones or where there is but one process."""
    if negatives == "global" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def rank_counts(pairs: int, group: dist.ProcessGroup | None) -> list[int] | None:
    """Pairs of every rank, known without asking: the data plan gives each rank equally many."""
    return None if group is None else [pairs] * group.size()
