"""Features of unit length: what contrastive scores compare."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from engine.sections.roles import Projection


class FeatureHead(nn.Module):
    """A linear map of what stands for a picture or a text, and unit length."""

    def __init__(self, width: int, features: int, projection: Projection):
        super().__init__()
        if projection == "none" and width != features:
            raise ValueError(f"model.projection_dim must be {width} where a tower of that width has no projection, got {features}")
        self.projection = None if projection == "none" else nn.Linear(width, features, bias=projection == "affine")

    def forward(self, pooled: Tensor) -> Tensor:
        return F.normalize(pooled if self.projection is None else self.projection(pooled), dim=-1)
