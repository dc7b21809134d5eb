"""Does the fusion encoder use the picture? Masked words beside the right and a wrong one, and matching of
pairs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import vlkernels as vk
from torch import Tensor

from engine.batch import TEXT, Batch
from engine.evaluation.gallery import Gallery, matching_logits
from engine.models import AlignAndFuse, VisionLanguageModel
from engine.models.transformer import Tokens


def masked_language_accuracy(model: AlignAndFuse, batches: Iterable[Batch]) -> dict[str, float]:
    """Share of masked words found beside the caption's own image and beside another one of its batch."""
    right, right_shuffled, total = 0, 0, 0
    for batch in batches:
        pairs = len(batch.labels)
        if pairs < 2:
            continue
        image = model.encode_image(batch)
        shuffled = torch.arange(pairs, dtype=torch.int32, device=batch.labels.device).roll(pairs // 2)
        text = model.encode_text(batch, masked=True)
        right += words_found(model, model.fuse(text, model.source_of(image)), batch)
        right_shuffled += words_found(model, model.fuse(text, model.source_of(image, shuffled)), batch)
        total += len(batch.masked_words.targets)
    return {
        "accuracy": float(right) / max(total, 1),
        "accuracy_shuffled_image": float(right_shuffled) / max(total, 1),
        "chance": 1 / len(model.words),
    }


def words_found(model: VisionLanguageModel, read: Tokens, batch: Batch) -> Tensor:
    """How many masked words have the highest logit, by states of the corrupted captions."""
    words = batch.masked_words
    selected = vk.take_rows(read.hidden, words.places.rows(read.layout, TEXT), impl=model.impl)
    logits = model.masked_language_head.logits(selected, model.words)
    return (logits.argmax(1) == words.targets).sum()


def matching_accuracy(model: AlignAndFuse, gallery: Gallery) -> dict[str, float]:
    """Accuracy on as many wrong pairs as right ones: text `i` with image `i`, and with one that is not its
    own."""
    own = torch.arange(len(gallery), device=gallery.labels.device)
    other = own.roll(max(len(gallery) // 2, 1))
    wrong = gallery.labels[own] != gallery.labels[other]
    accepted = matching_logits(model, gallery, own, own).argmax(1) == 1
    rejected = matching_logits(model, gallery, other[wrong], own[wrong]).argmax(1) == 0
    return {"accuracy": (accepted.float().mean().item() + rejected.float().mean().item()) / 2, "chance": 0.5}
