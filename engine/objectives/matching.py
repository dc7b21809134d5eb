"""Image-text matching with hard negatives."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.models.exchange import gather_tokens
from engine.models.passes import Variant
from engine.models.transformer import Source, Tokens
from engine.objectives.parts.batch_coupled import require_negatives
from engine.objectives.parts.gallery import Gallery
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import negatives_group, normalizer, rank_counts, widened
from engine.objectives.parts.objective import Losses, Objective, Report
from engine.objectives.parts.retrieval import reranked_retrieval
from engine.sections import require, require_not_negative

ORDER = (Variant.PLAIN, Variant.NEGATIVE_TEXT, Variant.NEGATIVE_IMAGE)
PAIRS_PER_PASS = 1024


@dataclass
class Matching(Objective):
    """Image-text matching with hard negatives (ITM).

    Two-way cross-entropy on three pairs per sample: its own, its image with a hard text, its text with a hard image.
    Negatives are drawn with the softmax of `hardness` times the contrastive scores, and never with the label of the
    sample itself.
    """

    roles: ClassVar[tuple[str, ...]] = ("image", "text", "fusion")

    negatives: Literal["global", "local"] = "global"
    """Where hard negatives are drawn from. global: the pairs of all ranks, which takes one micro-batch per rank and
    step; local: this rank's own micro-batch."""
    hardness: float = 1.0
    """Factor on the contrastive scores that negatives are drawn by. 1: as often as the contrastive softmax confuses
    them, so the loss has nothing to learn until fusion knows more than the towers; 0: all alike."""

    def __post_init__(self) -> None:
        require_not_negative(self, "objectives.matching", "hardness")

    def check(self, config: Any) -> None:
        super().check(config)
        require_negatives(config)

    def check_micro_steps(self, micro_steps: int) -> None:
        require(
            micro_steps == 1 or self.negatives == "local",
            f"objectives.matching.negatives must be local with {micro_steps} micro-batches per rank and step: states "
            "of the other micro-batches, which global negatives need, are not kept",
        )

    def build_head(self, model: VisionLanguageModel) -> nn.Module:
        return MatchingHead(model.last_stack.width, model.impl)

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[Losses, Report]:
        group = negatives_group(self.negatives)
        hard_texts, hard_images = draw_negatives(model, batch, group, self.hardness)
        texts, images = pair_up(model, batch, hard_texts.clamp(min=0), hard_images.clamp(min=0), group)
        logits = widened(matching_logits(model, model.fuse(texts, images)))
        total, accuracy = loss_of_pairs(logits, hard_texts, hard_images)
        return {"matching": total * normalizer(batch, "pairs")}, {"matching_accuracy": accuracy}

    def measure(self, model: VisionLanguageModel, held_out: HeldOut) -> Figures:
        """Right pairs told from wrong ones; and recall where the head has re-ranked the best by contrastive score."""
        gallery, top = held_out.gallery, held_out.options.rerank_top
        figures = {"matching": told_apart(model, gallery)}
        if top:
            match = functools.partial(logits_of_pairs, model, gallery)
            figures["reranked"] = reranked_retrieval(gallery, top, match)
        return figures


class MatchingHead(nn.Module):
    """Two logits from a sample's first token: the pair does not belong together, it does."""

    def __init__(self, width: int, impl: str):
        super().__init__()
        self.classifier = nn.Linear(width, 2)
        self.impl = impl

    def forward(self, hidden: Tensor, layout: vk.SegmentLayout) -> Tensor:
        first = vk.take_rows(hidden, layout.starts[:, 0], impl=self.impl)
        return self.classifier(first)


def loss_of_pairs(logits: Tensor, hard_texts: Tensor, hard_images: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over samples, accuracy) of the logits `[3 B, 2]` of pairs in `ORDER`."""
    own = torch.ones_like(hard_texts)
    targets = torch.cat((own, torch.zeros_like(hard_texts), torch.zeros_like(hard_images)))
    # A batch of one label has no negatives (-1): what stands in their place counts for nothing.
    drawn = torch.cat((own, hard_texts, hard_images)) >= 0
    each = F.cross_entropy(logits, targets.long(), reduction="none").masked_fill(~drawn, 0)
    right = (logits.detach().argmax(1) == targets) & drawn
    return each.sum() / len(ORDER), right.sum() / drawn.sum()


def matching_logits(model: VisionLanguageModel, fused: Tokens) -> Tensor:
    """`[B, 2]`: does not belong together, does."""
    return model.heads["matching"](fused.hidden, fused.layout)


def draw_negatives(
    model: VisionLanguageModel, batch: Batch, group: dist.ProcessGroup | None, hardness: float
) -> tuple[Tensor, Tensor]:
    """A hard text per image and a hard image per text: rows of the batch of all ranks in the group, -1 for
    none."""
    return vk.hard_negatives(
        model.image_features(batch),
        model.text_features(batch),
        hardness * model.scale(),
        labels=batch.labels,
        rng=model.rng,
        stream=model.negatives_stream,
        sample_ids=batch.sample_ids,
        group=group,
        rank_counts=rank_counts(len(batch.labels), group),
        impl=model.impl,
    )


def pair_up(
    model: VisionLanguageModel,
    batch: Batch,
    hard_texts: Tensor,
    hard_images: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Tokens, Source]:
    """Own pairs, then own images with hard texts, then own texts with hard images.

    On one process no image state is copied: several texts read the keys and values of one image.
    """
    text, pairs = model.before_fusion(batch), len(batch.labels)
    here = torch.arange(pairs, device=hard_texts.device)
    if group is None:
        own, source = here, model.image_source(batch)
        images = replace(source, index=torch.cat((here, here, hard_images)).to(torch.int32))
    else:
        own, text = here + pairs * dist.get_rank(group), gather_tokens(text, group)
        drawn = gather_tokens(model.image_states(batch), group).take(
            torch.cat((own, hard_images)), model.impl
        )
        images = model.source_of(drawn, torch.cat((here, here, here + pairs)).to(torch.int32))
    texts = text.take(torch.cat((own, hard_texts, own)), model.impl)
    identities = torch.cat([variant.identities(batch.sample_ids) for variant in ORDER])
    return Tokens(texts.hidden, texts.layout.with_sample_ids(identities)), images


def logits_of_pairs(model: VisionLanguageModel, gallery: Gallery, images: Tensor, texts: Tensor) -> Tensor:
    """`[P, 2]` for pairs (`images[p]`, `texts[p]`); pairs sorted by image cost one projection per image."""
    logits = []
    for some_images, some_texts in zip(
        images.split(PAIRS_PER_PASS), texts.split(PAIRS_PER_PASS), strict=True
    ):
        needed, index = some_images.unique(return_inverse=True)
        source = model.source_of(gallery.images.take(needed, model.impl), index.to(torch.int32))
        fused = model.fuse(gallery.texts.take(some_texts, model.impl), source)
        logits.append(matching_logits(model, fused))
    return torch.cat(logits).float()


def told_apart(model: VisionLanguageModel, gallery: Gallery) -> dict[str, float]:
    """Loss and accuracy on wrong pairs, which count as much as right ones: text `i` with image `i`, and with one that is
    not its own."""
    own = torch.arange(len(gallery), device=gallery.labels.device)
    other = own.roll(max(len(gallery) // 2, 1))
    wrong = gallery.labels[own] != gallery.labels[other]
    require_some(int(wrong.sum()), "pairs of two different images")
    found = Counter()
    for images, texts, label in ((own, own, 1), (other[wrong], own[wrong], 0)):
        logits = logits_of_pairs(model, gallery, images, texts)
        found["loss"] += F.cross_entropy(logits, torch.full_like(texts, label)).item() / 2
        found["accuracy"] += (logits.argmax(1) == label).float().mean().item() / 2
    return {**found, "loss_even_odds": math.log(2), "accuracy_even_odds": 0.5}
