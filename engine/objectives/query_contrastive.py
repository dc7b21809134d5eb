"""Image-text contrastive loss of the query that suits the text best (BLIP-2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch
from engine.models.features import scale_within
from engine.models.transformer import Tokens
from engine.objectives.parts.batch_coupled import BatchCoupledObjective, Features
from engine.objectives.parts.held_out import Figures, HeldOut
from engine.objectives.parts.normalization import negatives_group, rank_counts, widened
from engine.objectives.parts.objective import Losses, Report
from engine.objectives.parts.retrieval import both_ways, contrast
from engine.sections import require, require_share


ALONE = "separate"
"""The mask table of both sides of the contrast."""


@dataclass
class QueryContrastive(BatchCoupledObjective):
    """Image-text contrastive loss whose similarities are the largest over the queries (ITC of BLIP-2).

    Queries and text stand in one stream and see themselves alone; a text is its first token.
    """

    roles: ClassVar[tuple[str, ...]] = ("joint",)

    label_smoothing: float = 0.0
    """Share of each target that is spread over all pairs (BLIP-2: 0.1)."""

    def __post_init__(self) -> None:
        require_share(f"objectives.{self.name}.label_smoothing", self.label_smoothing)

    def check(self, config: Any) -> None:
        super().check(config)
        require_queries(config, self.name)

    def mask_of_joint(self, joint: Any) -> str:
        return ALONE

    def build_head(self, model: Any) -> nn.Module:
        options = model.options
        limits = options.logit_scale_min, options.logit_scale_max
        return QueryHead(options.joint.width, options.projection_dim, options.logit_scale_init, limits)

    def features(self, model: Any, batch: Batch) -> Features:
        queries, texts, scale = compared(model, batch)
        return Features({"image": queries.flatten(0, 1), "text": texts}, {"scale": scale})

    def loss(self, features: Features, impl: str) -> tuple[Losses, Report]:
        image, text, scale = features.rows["image"], features.rows["text"], features.numbers["scale"]
        group, pairs = negatives_group("global"), len(text)
        layouts = {"image_layout": len(image) // pairs, "text_layout": 1}
        loss = vk.late_interaction_loss(
            image,
            text,
            scale,
            **{name: vk.SegmentLayout([[each]] * pairs).to(scale.device) for name, each in layouts.items()},
            similarity="max",
            label_smoothing=self.label_smoothing,
            group=group,
            rank_counts=rank_counts(pairs, group),
            rank_reduction="mean",
            impl=impl,
        )
        return {self.name: loss}, {"logit_scale": scale.detach()[0]}

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Recall both ways among the gallery, by these similarities, beside chance; and the loss over it, beside that of
        equal similarities."""
        found = [compared(model, batch) for batch in held_out.ranked]
        labels = torch.cat([batch.labels for batch in held_out.ranked])
        *features, scales = zip(*found, strict=True)
        scores = similarities(*map(torch.cat, features))
        losses = contrast(scales[0] * scores, scales[0] * scores.T)
        return {self.name: both_ways(scores, scores.T, labels[:, None] == labels[None, :]), f"{self.name}_loss": losses}


class QueryHead(nn.Module):
    """Features of queries and texts, of unit length, and what multiplies their products."""

    def __init__(self, width: int, features: int, scale: float, limits: tuple[float, float]):
        super().__init__()
        self.image, self.text = nn.Linear(width, features), nn.Linear(width, features)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.limits = limits

    def forward(self, queries: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = scale_within(self.logit_scale, *self.limits)
        return F.normalize(self.image(queries), dim=-1), F.normalize(self.text(texts), dim=-1), scale


def require_queries(config: Any, objective: str) -> None:
    """Refuse a joint stream without queries of an image beside a text."""
    joint = config.model.joint
    require(
        joint.queries > 0 and joint.text and joint.source == "image",
        f"objectives.{objective} needs model.joint with queries, text and source image",
    )


def compared(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, Q, E]`, texts `[B, E]` and the scale."""
    read: Tokens = model.joint_states(batch, mask=ALONE)
    queries, texts = (read.layout.starts[:, model.joint.segment(name)].long() for name in ("queries", "text"))
    own = queries[:, None] + torch.arange(model.options.joint.queries, device=queries.device)
    rows = vk.take_rows(read.hidden, torch.cat((own.flatten(), texts)), impl=model.impl)
    own_rows, text_rows = rows.split((own.numel(), len(texts)))
    return model.heads["query_contrastive"](own_rows.unflatten(0, own.shape), text_rows)


def similarities(queries: Tensor, texts: Tensor) -> Tensor:
    """`[N, M]`: of images to texts, the largest product of a query."""
    return widened(torch.einsum("nqe,me->nqm", queries, texts).amax(1))
