"""Image-text contrastive loss over similarities of tokens (FILIP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vlkernels as vk
from torch import Tensor
from torch.nn import functional as F

from engine.batch import Batch
from engine.models.transformer import Tokens
from engine.objectives.parts.batch_coupled import BatchCoupledObjective, Features
from engine.objectives.parts.held_out import Figures, HeldOut
from engine.objectives.parts.normalization import negatives_group, rank_counts
from engine.objectives.parts.objective import Losses, Report
from engine.objectives.parts.retrieval import both_ways, contrast


@dataclass
class LateInteraction(BatchCoupledObjective):
    """Image-text contrastive loss whose similarities are means over tokens of their best match (FILIP)."""

    roles: ClassVar[tuple[str, ...]] = ("image", "text")

    label_smoothing: float = 0.0
    """Share of each target that is spread over all pairs."""

    def features(self, model: Any, batch: Batch) -> Features:
        rows, longest = {}, {}
        for name, tokens in (("image", model.image_states(batch)), ("text", model.text_states(batch))):
            rows |= {name: mapped(model, name, tokens).hidden, f"{name}_lengths": tokens.layout.lengths.sum(1)}
            longest[name] = tokens.layout.max_seqlen
        return Features(rows, {"scale": model.scale()}, longest)

    def loss(self, features: Features, impl: str) -> tuple[Losses, Report]:
        rows, scale = features.rows, features.numbers["scale"]
        group = negatives_group("global")
        layouts = {f"{name}_layout": _layout(features, name) for name in ("image", "text")}
        loss = vk.late_interaction_loss(
            rows["image"],
            rows["text"],
            scale,
            **layouts,
            label_smoothing=self.label_smoothing,
            group=group,
            rank_counts=rank_counts(len(rows["image_lengths"]), group),
            rank_reduction="mean",
            impl=impl,
        )
        return {self.name: loss}, {"logit_scale": scale.detach()[0]}

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Recall both ways among the gallery, by these similarities, beside chance; and the loss over it, beside that of
        equal similarities."""
        gallery = held_out.gallery
        image, text = mapped(model, "image", gallery.images), mapped(model, "text", gallery.texts)
        by_image, by_text = similarities(image, text), similarities(text, image)
        losses = contrast(model.scale() * by_image, model.scale() * by_text)
        return {self.name: both_ways(by_image, by_text, gallery.related), f"{self.name}_loss": losses}


def mapped(model: Any, role: str, tokens: Tokens) -> Tokens:
    """Every token as the map to features has it, which for other losses is given what stands for the sample."""
    return Tokens(getattr(model, f"{role}_head")(tokens.hidden), tokens.layout)


def _layout(features: Features, name: str) -> vk.SegmentLayout:
    """Where the tokens of every sample lie; its lengths stay on the device."""
    bounds = F.pad(features.rows[f"{name}_lengths"].cumsum(0), (1, 0))
    sizes = {"max_seqlen": features.bounds[name], "num_tokens": len(features.rows[name])}
    return vk.SegmentLayout.from_cu_seqlens(bounds, **sizes)


def similarities(of: Tokens, to: Tokens) -> Tensor:
    """`[N, M]`: of each sample to each of the others, the mean over its tokens of the best product."""
    lengths = of.layout.lengths.sum(1)
    sample = torch.repeat_interleave(lengths)
    starts = to.layout.lengths.sum(1).cumsum(0).tolist()
    found = []
    for first, stop in zip([0, *starts], starts):
        best = (of.hidden @ to.hidden[first:stop].T).amax(1).float()
        found.append(torch.zeros(len(lengths), device=best.device).index_add_(0, sample, best) / lengths)
    return torch.stack(found, dim=1)
