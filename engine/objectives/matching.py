"""Image-text matching with hard negatives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import vlkernels as vk
from torch import Tensor
from torch.nn import functional as F

from engine.batch import Batch
from engine.models import AlignAndFuse
from engine.models.exchange import gather_tokens
from engine.models.align_and_fuse import Variant
from engine.models.transformer import Source, Tokens
from engine.objectives.normalization import negatives_group, normalizer, rank_counts, widened

ORDER = (Variant.PLAIN, Variant.NEGATIVE_TEXT, Variant.NEGATIVE_IMAGE)


@dataclass(frozen=True)
class MatchingObjective:
    """Two-way cross-entropy on three pairs per sample: its own, its image with a hard text, its text with a
    hard image.

    Negatives are drawn with the softmax of `hardness` times the contrastive scores, from all ranks ("global") or
    from this rank ("local"), and never with the label of the sample itself.
    """

    negatives: str = "global"
    hardness: float = 1.0

    def __call__(self, model: AlignAndFuse, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        group = negatives_group(self.negatives)
        hard_texts, hard_images = draw_negatives(model, batch, group, self.hardness)
        texts, images = pair_up(model, batch, hard_texts.clamp(min=0), hard_images.clamp(min=0), group)
        logits = widened(model.matching_logits(model.fuse(texts, images)))
        own = torch.ones_like(hard_texts)
        targets = torch.cat((own, torch.zeros_like(hard_texts), torch.zeros_like(hard_images)))
        # A batch of one label has no negatives (-1): what stands in their place counts for nothing.
        drawn = torch.cat((own, hard_texts, hard_images)) >= 0
        each = F.cross_entropy(logits, targets.long(), reduction="none").masked_fill(~drawn, 0)
        right = (logits.detach().argmax(1) == targets) & drawn
        report = {"matching_accuracy": right.sum() / drawn.sum()}
        return {"matching": each.sum() / len(ORDER) * normalizer(batch, "pairs")}, report


def draw_negatives(
    model: AlignAndFuse, batch: Batch, group: dist.ProcessGroup | None, hardness: float
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
    model: AlignAndFuse,
    batch: Batch,
    hard_texts: Tensor,
    hard_images: Tensor,
    group: dist.ProcessGroup | None,
) -> tuple[Tokens, Source]:
    """Own pairs, then own images with hard texts, then own texts with hard images.

    On one process no image state is copied: several texts read the keys and values of one image.
    """
    text, pairs = model.encode_text(batch), len(batch.labels)
    here = torch.arange(pairs, device=hard_texts.device)
    if group is None:
        own, source = here, model.image_source(batch)
        images = replace(source, index=torch.cat((here, here, hard_images)).to(torch.int32))
    else:
        own, text = here + pairs * dist.get_rank(group), gather_tokens(text, group)
        drawn = gather_tokens(model.encode_image(batch), group).take(
            torch.cat((own, hard_images)), model.impl
        )
        images = model.source_of(drawn, torch.cat((here, here, here + pairs)).to(torch.int32))
    texts = text.take(torch.cat((own, hard_texts, own)), model.impl)
    identities = torch.cat([variant.identities(batch.sample_ids) for variant in ORDER])
    return Tokens(texts.hidden, texts.layout.with_sample_ids(identities)), images
