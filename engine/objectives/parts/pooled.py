"""What stands for a whole sample, and what classes are predicted of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from engine.batch import Batch
from engine.objectives.parts.normalization import widened

ROLES = ("joint", "text", "image")
"""Roles that pool their states, those first that know more of the sample."""


class PooledHead(nn.Module):
    """A linear map of what stands for the sample."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """`[B, C]`."""
        return widened(self.classifier(pooled))


def pooling_role(model: Any) -> str:
    """The role whose pooled states stand for the sample."""
    return next(name for name in ROLES if getattr(model, name) is not None)


def pooled_head(model: Any, classes: int) -> PooledHead:
    """A head on that role."""
    return PooledHead(getattr(model.options, pooling_role(model)).width, classes)


def pooled_states(model: Any, batch: Batch, view: str | None = None) -> Tensor:
    """`[B, D]`, of the samples or of what a view has left of their texts."""
    role = pooling_role(model)
    if role == "image":
        return model.image.pooled(model.image_states(batch))
    read = model.joint_states if role == "joint" else model.text_states
    return getattr(model, role).pooled(read(batch, view))
