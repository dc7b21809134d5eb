"""Image-text matching with hard negatives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from engine.data import Batch
from engine.models import VisionLanguageModel
from engine.models.exchange import gather_tokens
from engine.models.model import Variant
from engine.models.transformer import Source, Tokens
from engine.objectives.normalization import negatives_group, normalizer

ORDER = (Variant.PLAIN, Variant.NEGATIVE_TEXT, Variant.NEGATIVE_IMAGE)


@dataclass(frozen=True)
class MatchingObjective:
    """Two-way cross-entropy on three pairs per sample: its own, its image with a hard text, its text with a hard image.

    Negatives are drawn with the probability the contrastive score gives them, from all ranks ("global") or from this
    rank ("local"), and never with the label of the sample itself.
    """

    negatives: str = "global"

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        group = negatives_group(self.negatives)
        texts, images = _pairs(model, batch, group)
        logits = model.matching_logits(model.fuse(texts, images)).float()
        pairs = len(batch.labels)
        targets = (torch.arange(len(logits), device=logits.device) < pairs).long()
        total = F.cross_entropy(logits, targets, reduction="sum") / len(ORDER)
        report = {"matching_accuracy": (logits.detach().argmax(1) == targets).float().mean()}
        return {"matching": total * normalizer(batch, "pairs")}, report


def _pairs(model: VisionLanguageModel, batch: Batch, group: dist.ProcessGroup | None) -> tuple[Tokens, Source]:
    """Own pairs, then own images with hard texts, then own texts with hard images; image states are never copied
    on one process: several texts read the keys and values of one image."""
    hard_texts, hard_images = _hard_negatives(model, batch, group)
    text, pairs = model.encode_text(batch), len(batch.labels)
    here = torch.arange(pairs, dtype=torch.int32, device=batch.labels.device)
    if group is None:
        own, source = here, model.image_source(batch)
        images = replace(source, index=torch.cat((here, here, hard_images)))
    else:
        own, text = here + pairs * dist.get_rank(group), gather_tokens(text, group)
        drawn = gather_tokens(model.encode_image(batch), group).take(torch.cat((own, hard_images)), model.impl)
        images = model.source_of(drawn, torch.cat((here, here, here + pairs)))
    texts = text.take(torch.cat((own, hard_texts, own)), model.impl)
    identities = torch.cat([variant.identities(batch.sample_ids) for variant in ORDER])
    return Tokens(texts.hidden, texts.layout.with_sample_ids(identities)), images
