"""Image-text matching with images replaced at random (ITM), and word-region alignment (WRA)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch, Places, Sample
from engine.models import VisionLanguageModel
from engine.models.transformer import SelectedRows, Tokens
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer, widened
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.objectives.parts.other_images import with_images
from engine.objectives.parts.retrieval import both_ways
from engine.sections import require, require_not_negative, require_share

GALLERY = 100
"""Most pairs for retrieval by the matching head, which reads every caption with every image."""
WORDS = "random_matching words"
"""The view that tells words from special tokens."""


@dataclass
class RandomMatching(Objective):
    """Image-text matching with images replaced at random before batching (ITM), and word-region alignment (WRA).

    Two-way cross-entropy: is the image the caption's own? In a joint stream also `alignment` times the optimal-transport
    distance between words and regions of own pairs, less that of replaced ones. Both are means over all pairs. The named
    losses are what enters the total, so the second contains its factor; the report has the mean distances themselves.
    """

    roles: ClassVar[tuple[str, ...]] = ("joint or co_attention",)
    alone: ClassVar[bool] = True

    probability: float = 0.5
    """Share of pairs whose image is replaced by another one, drawn anew every epoch."""
    alignment: float = 0.1
    """Factor of the alignment loss: optimal-transport distance of own pairs less that of replaced ones (0: none)."""
    aligned: Literal["all", "words"] = "all"
    """Which tokens of a text it moves. all: [CLS] and [SEP] too (UNITER); words: none but words (ViLT)."""

    def __post_init__(self) -> None:
        require_share("objectives.random_matching.probability", self.probability)
        require_not_negative(self, "objectives.random_matching", "alignment")

    @property
    def replaced_images(self) -> float:
        return self.probability

    def check(self, config: Any) -> None:
        super().check(config)
        require(
            self.alignment == 0 or config.model.joint is not None,
            f"objectives.random_matching.alignment moves words to regions of model.joint: without it, it must be 0, "
            f"got {self.alignment}",
        )

    def prepare(self, sample: Sample, draw: Draw) -> None:
        sample.views[self.name] = int(sample.own_image)
        if self.alignment > 0 and self.aligned == "words":
            sample.views[WORDS] = Places.of_sample(np.flatnonzero(sample.text.words >= 0))

    def build_head(self, model: VisionLanguageModel) -> nn.Module:
        if model.joint is not None:
            return nn.Linear(model.options.joint.width, 2)
        image, text = model.options.image.width, model.options.text.width
        return ProductHead(image, text, model.options.co_attention.width)

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Losses, Report]:
        own, factor = batch.views[self.name], normalizer(batch, "pairs")
        logits = widened(matching_logits(model, batch))
        losses = {"random_matching": F.cross_entropy(logits, own, reduction="sum") * factor}
        report = {"matching_accuracy": (logits.detach().argmax(1) == own).float().mean()}
        if self.alignment > 0:
            distance = transport_distance(model, model.joint_states(batch), batch.views.get(WORDS))
            signed = (2 * own - 1) * distance
            losses["word_region_alignment"] = self.alignment * signed.sum() * factor
            report["transport_own"] = _mean_where(own == 1, distance.detach())
            report["transport_replaced"] = _mean_where(own == 0, distance.detach())
        return losses, report

    def measure(self, model: VisionLanguageModel, held_out: HeldOut) -> Figures:
        """Own images told from replaced ones, how far the words are from the regions of either, and retrieval."""
        totals, distances = Counter(), Counter()
        for batch in held_out.batches(self.name):
            with model.passes_shared():
                losses, report = self(model, batch)
            own = int(batch.views[self.name].sum())
            kinds = {"own": own, "replaced": len(batch.labels) - own}
            totals.update(kinds)
            totals["loss"] += losses[self.name].item()
            totals["right"] += round(report["matching_accuracy"].item() * len(batch.labels))
            if self.alignment > 0:
                distances.update({kind: report[f"transport_{kind}"].item() * kinds[kind] for kind in kinds})
        gallery = held_out.first(min(held_out.options.gallery, GALLERY))
        return figures(totals, distances) | {"retrieval": matching_retrieval(model, gallery)}


def figures(totals: Counter[str], distances: Counter[str]) -> Figures:
    """What sums over pairs of either kind come to. The loss of alignment is that of as many replaced images as own ones."""
    own, replaced = totals["own"], totals["replaced"]
    require_some(min(own, replaced), "pairs of own or of replaced images")
    found: Figures = {
        "random_matching": {
            "loss": totals["loss"] / (own + replaced),
            "loss_even_odds": math.log(2),
            "accuracy": totals["right"] / (own + replaced),
            "accuracy_majority": max(own, replaced) / (own + replaced),
        }
    }
    if distances:
        near, far = distances["own"] / own, distances["replaced"] / replaced
        losses = {"loss": near - far, "loss_all_alike": 0.0}
        found["word_region_alignment"] = {"distance": near, "distance_replaced": far, **losses}
    return found


class ProductHead(nn.Module):
    """Of two rows that stand for a picture and for a text: their product, each behind a linear map and relu, decides."""

    def __init__(self, image_width: int, text_width: int, width: int):
        super().__init__()
        self.image_map, self.text_map = nn.Linear(image_width, width), nn.Linear(text_width, width)
        self.classifier = nn.Linear(width, 2)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.classifier(self.image_map(image).relu() * self.text_map(text).relu())


def matching_logits(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """`[B, 2]`: the image was replaced, it is the caption's own."""
    head = model.heads["random_matching"]
    if model.joint is not None:
        return head(model.pooled(model.joint_states(batch)))
    return head(model.image.pooled(model.image_states(batch)), model.text.pooled(model.text_states(batch)))


def matching_retrieval(model: VisionLanguageModel, gallery: Batch) -> dict[str, float]:
    """Recall both ways where the matching head has read every caption with every image."""
    texts = torch.arange(len(gallery.labels), device=gallery.labels.device)
    scores = torch.empty(len(texts), len(texts), device=texts.device)
    for shift in range(len(texts)):
        images = texts.roll(shift)
        with model.passes_shared():
            logits = matching_logits(model, with_images(gallery, images)).float()
        scores[images, texts] = logits[:, 1] - logits[:, 0]
    return both_ways(scores, scores.T, gallery.labels[:, None] == gallery.labels[None, :])


def transport_distance(model: VisionLanguageModel, read: Tokens, words: Places | None) -> Tensor:
    """float32 `[B]`: cost of moving each caption, or these tokens of it, to its regions or patches."""
    moved, segment = read, model.joint.segment("text")
    if words is not None:
        chosen = SelectedRows.of(words.rows(read.layout, segment), words.samples, read.layout)
        moved, segment = Tokens(vk.take_rows(read.hidden, chosen.index, impl=model.impl), chosen.layout), 0
    return vk.optimal_transport(
        read.hidden,
        moved.hidden,
        image_layout=read.layout,
        text_layout=moved.layout,
        image_segment=model.joint.segment("image"),
        text_segment=segment,
        impl=model.impl,
    )


def _mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    """0 where none is chosen."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)
