"""Held-out figures of a model over one stream of words and regions: every loss beside a blind guess."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from engine.batch import Batch
from engine.config import Config
from engine.data import DataError
from engine.evaluation.accuracy import words_found
from engine.evaluation.baselines import ClassPrior, MeanRegion
from engine.evaluation.other_images import other_images, with_images
from engine.evaluation.retrieval import both_ways
from engine.models import OneStream
from engine.objectives import build_objectives
from engine.objectives.masked_language import MaskedLanguageObjective
from engine.objectives.masked_regions import (
    MaskedRegionClassesObjective,
    MaskedRegionFeaturesObjective,
    best_classes,
    class_logits,
)
from engine.objectives.random_matching import RandomMatchingObjective

MATCHING_GALLERY = 100
"""Most pairs for retrieval by a matching head, which reads every caption with every image."""

Figures = dict[str, dict[str, float]]
Batches = Iterable[Batch]


def evaluate_one_stream(
    model: OneStream, read: Callable[[int, str | None], Batches], config: Config
) -> dict[str, Any]:
    """Figures by the name of their loss. Beside NAME of a group, NAME_OTHER is what to compare it with.

    `read(pairs, task)` gives the held-out batches of so many pairs for one objective, or for none (None).
    """
    device = model.words.device
    pairs: Counter[str] = Counter()

    def batches(task: str) -> Iterator[Batch]:
        for batch in read(config.evaluation.batch, task):
            pairs[task] += batch.counts["pairs"]
            batch.normalizers = {name: torch.ones(()) for name in batch.counts}  # losses are sums: totals are exact
            yield batch.to(device)

    results: dict[str, Any] = {}
    for task, (_, objective) in build_objectives(config.objectives).items():
        results |= MEASURES[task](model, objective, batches(task))
    if config.objectives.random_matching is not None:
        gallery = next(iter(read(min(config.evaluation.gallery, MATCHING_GALLERY), None)))
        results["retrieval"] = matching_retrieval(model, gallery.to(device))
    return {"pairs": max(pairs.values()), **results}


def masked_words(model: OneStream, objective: MaskedLanguageObjective, batches: Batches) -> Figures:
    """Found beside the caption's own image, and beside another one of the batch."""
    totals, count = Counter(), 0
    for batch in batches:
        others = other_images(batch.labels)
        if others is None:
            continue
        for seen, beside in ((batch, ""), (with_images(batch, others), "_shuffled_image")):
            with model.passes_shared():
                totals["loss" + beside] += objective(model, seen)[0]["masked_language"].item()
                totals["accuracy" + beside] += words_found(model, model.encode_masked_words(seen), seen).item()
        count += batch.counts["masked_words"]
    require_some(count, "masked words beside two different images")
    figures = {name: total / count for name, total in totals.items()}
    return {"masked_language": figures | {"accuracy_chance": 1 / len(model.words)}}


def matching(model: OneStream, objective: RandomMatchingObjective, batches: Batches) -> Figures:
    """Own images told from replaced ones, and how far the words are from the regions of either."""
    totals, distances = Counter(), Counter()
    for batch in batches:
        losses, report = objective(model, batch)
        kinds = {"own": int(batch.own_image.sum()), "replaced": int((1 - batch.own_image).sum())}
        totals.update(kinds)
        totals["loss"] += losses["random_matching"].item()
        totals["right"] += round(report["matching_accuracy"].item() * sum(kinds.values()))
        if objective.alignment > 0:
            distances.update({kind: report[f"transport_{kind}"].item() * kinds[kind] for kind in kinds})
    own, replaced = totals["own"], totals["replaced"]
    require_some(min(own, replaced), "pairs of own or of replaced images")
    figures: Figures = {
        "random_matching": {
            "loss": totals["loss"] / (own + replaced),
            "loss_even_odds": math.log(2),
            "accuracy": totals["right"] / (own + replaced),
            "accuracy_majority": max(own, replaced) / (own + replaced),
        }
    }
    if distances:
        figures["word_region_alignment"] = {
            "distance": distances["own"] / own,
            "distance_replaced": distances["replaced"] / replaced,
        }
    return figures


def region_features(
    model: OneStream, objective: MaskedRegionFeaturesObjective, batches: Batches
) -> Figures:
    """Squared error of the features of masked regions, and that of their mean."""
    loss, mean = 0.0, MeanRegion()
    for batch in batches:
        loss += objective(model, batch)[0]["masked_region_features"].item()
        mean.add(batch.image.features[batch.masked_regions.places.rows(batch.image_layout)])
    require_some(mean.count, "masked regions")
    return {"masked_region_features": {"loss": loss / mean.count, "loss_mean_region": mean.squared_error}}


def region_classes(
    model: OneStream, objective: MaskedRegionClassesObjective, batches: Batches
) -> Figures:
    """Divergence from the detector's distributions over classes, and that of their mean. For hard targets the
    cross-entropy, and how often the class is found, or would be by naming the most frequent one."""
    loss, right, prior = 0.0, 0, ClassPrior()
    for batch in batches:
        labels = batch.masked_regions.soft_labels
        with model.passes_shared():
            loss += objective(model, batch)[0]["masked_region_classes"].item()
            if objective.targets == "hard":
                best = best_classes(labels)
                right += int((class_logits(model, batch).argmax(1) == best).sum())
                labels = F.one_hot(best, labels.shape[1])
        prior.add(labels)
    require_some(prior.count, "masked regions")
    per_label = 1 if objective.targets == "hard" else labels.shape[1]  # the soft loss is a mean over classes, too
    figures = {"loss": loss / prior.count, "loss_class_prior": prior.divergence / per_label}
    if objective.targets == "hard":
        figures |= {"accuracy": right / prior.count, "accuracy_most_frequent": prior.largest_share}
    return {"masked_region_classes": figures}


def matching_retrieval(model: OneStream, gallery: Batch) -> dict[str, float]:
    """Recall both ways where the matching head has read every caption with every image."""
    texts = torch.arange(len(gallery.labels), device=gallery.labels.device)
    scores = torch.empty(len(texts), len(texts), device=texts.device)
    for shift in range(len(texts)):
        images = texts.roll(shift)
        logits = model.matching_logits(model.encode(with_images(gallery, images))).float()
        scores[images, texts] = logits[:, 1] - logits[:, 0]
    return both_ways(scores, scores.T, gallery.labels[:, None] == gallery.labels[None, :])


def require_some(count: int, what: str) -> None:
    if not count:
        raise DataError(f"there are no held-out {what} to evaluate")


MEASURES = {
    "masked_language": masked_words,
    "random_matching": matching,
    "masked_region_features": region_features,
    "masked_region_classes": region_classes,
}
"""What measures each objective."""
