"""Image-text matching by queries that see the text, with hard negatives (BLIP-2)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch, Text
from engine.models.exchange import gather_tokens
from engine.models.passes import Variant, drawn_as
from engine.models.transformer import SelectedRows, Source, Tokens
from engine.objectives.matching import loss_of_pairs
from engine.objectives.parts.batch_coupled import require_negatives
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import negatives_group, normalizer, rank_counts, widened
from engine.objectives.parts.objective import Losses, Objective, Report
from engine.objectives.parts.other_images import other_images
from engine.objectives.query_contrastive import compared, require_queries, similarities
from engine.sections import require, require_not_negative


TOGETHER = "full"
"""The mask table of a pair that is to be told."""


@dataclass
class QueryMatching(Objective):
    """Image-text matching with hard negatives, by all queries (ITM of BLIP-2).

    Two-way cross-entropy on three pairs per sample, as of `matching`; queries and text see each other, and the logits are
    means over the queries. Negatives are drawn from the pairs of all ranks, with the softmax of `hardness` times the scores of
    query_contrastive.
    """

    roles: ClassVar[tuple[str, ...]] = ("joint",)

    hardness: float = 1.0
    """Factor on the scores that negatives are drawn by; as of `matching`."""

    def __post_init__(self) -> None:
        require_not_negative(self, "objectives.query_matching", "hardness")

    def check(self, config: Any) -> None:
        super().check(config)
        require_negatives(config)
        require_queries(config, self.name)
        given = "query_contrastive" in config.objectives.active
        require(given, "objectives.query_matching draws by its similarities: give objectives.query_contrastive")

    def check_micro_steps(self, micro_steps: int) -> None:
        require(
            micro_steps == 1,
            "objectives.query_matching draws from all pairs of a step, whose states are not kept: it takes one micro-batch "
            f"per rank and step, got {micro_steps}",
        )

    def mask_of_joint(self, joint: Any) -> str:
        return TOGETHER

    def build_head(self, model: Any) -> nn.Module:
        return nn.Linear(model.options.joint.width, 2)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        group = negatives_group("global")
        hard_texts, hard_images = draw_negatives(model, batch, group, self.hardness)
        text, source = pair_up(model, batch, hard_texts.clamp(min=0), hard_images.clamp(min=0), group)
        total, accuracy = loss_of_pairs(logits_of(model, text, source), hard_texts, hard_images)
        return {self.name: total * normalizer(batch, "pairs")}, {f"{self.name}_accuracy": accuracy}

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Texts beside their own image, and beside another one of the batch."""
        totals = Counter()
        for batch in held_out.ranked:
            if (others := other_images(batch.labels)) is None:
                continue
            own = torch.arange(len(others), device=others.device)
            for index, label in ((own, 1), (others, 0)):
                source = replace(source_of(model, model.image_states(batch)), index=index.to(torch.int32))
                logits = logits_of(model, batch.text, source)
                totals["loss"] += F.cross_entropy(logits, torch.full_like(own, label), reduction="sum").item()
                totals["right"] += int((logits.argmax(1) == label).sum())
                totals["pairs"] += len(own)
        require_some(totals["pairs"], "pairs of two different images")
        figures = {"loss": totals["loss"] / totals["pairs"], "loss_even_odds": math.log(2)}
        return {self.name: figures | {"accuracy": totals["right"] / totals["pairs"], "accuracy_majority": 0.5}}


def source_of(model: Any, image: Tokens, index: Tensor | None = None) -> Source:
    return model.joint.source_of(image, index)


def logits_of(model: Any, text: Text, source: Source) -> Tensor:
    """`[B, 2]`: does not belong together, does."""
    layout = model.joint.layout_of(text.layout, text.layout, None).with_sample_ids(text.layout.sample_ids)
    queries = SelectedRows.whole(layout, (model.joint.segment("queries"),))
    read = model.joint(text, None, layout, model.rng, mask=TOGETHER, source=source, selected=queries)
    # A linear map of the mean is the mean of the maps.
    return widened(model.heads["query_matching"](vk.segment_mean(read.hidden, read.layout, 0, impl=model.impl)))


@torch.no_grad()
def draw_negatives(model: Any, batch: Batch, group: dist.ProcessGroup | None, hardness: float) -> tuple[Tensor, Tensor]:
    """A hard text per image and a hard image per text: rows of the batch of all ranks, -1 for none."""
    queries, texts, scale = compared(model, batch)
    pairs, first, everyone = len(texts), 0, texts
    if group is not None:
        first = pairs * dist.get_rank(group)
        everyone = gather_tokens(Tokens(texts, vk.SegmentLayout([[1]] * pairs).to(texts.device)), group).hidden
    scores = similarities(queries, everyone)
    # Rows of scores times rows of the identity are the scores, in either direction.
    places = torch.eye(len(everyone), dtype=scores.dtype, device=scores.device)[first : first + pairs]
    return vk.hard_negatives(
        scores,
        places,
        hardness * scale,
        labels=batch.labels,
        rng=model.rng,
        stream=model.negatives_stream,
        sample_ids=batch.sample_ids,
        group=group,
        rank_counts=rank_counts(pairs, group),
        impl=model.impl,
    )


def pair_up(
    model: Any, batch: Batch, hard_texts: Tensor, hard_images: Tensor, group: dist.ProcessGroup | None
) -> tuple[Text, Source]:
    """Own pairs, then own images with hard texts, then own texts with hard images."""
    ids = Tokens(batch.text.ids.to(torch.int32)[:, None], batch.text.layout)
    image, pairs = model.image_states(batch), len(batch.labels)
    here = torch.arange(pairs, device=hard_texts.device)
    if group is None:
        source = source_of(model, image, torch.cat((here, here, hard_images)).to(torch.int32))
        texts = ids.take(torch.cat((here, hard_texts, here)), model.impl)
    else:
        own = here + pairs * dist.get_rank(group)
        drawn = gather_tokens(image, group).take(torch.cat((own, hard_images)), model.impl)
        source = source_of(model, drawn, torch.cat((here, here, here + pairs)).to(torch.int32))
        texts = gather_tokens(ids, group).take(torch.cat((own, hard_texts, own)), model.impl)
    hard = [variant.identities(batch.sample_ids) for variant in (Variant.NEGATIVE_TEXT, Variant.NEGATIVE_IMAGE)]
    own_pairs = drawn_as(batch.text.layout, batch, None, stage=1).sample_ids  # the contrast's pass has those of stage 0
    return Text(texts.hidden[:, 0].long(), texts.layout.with_sample_ids(torch.cat((own_pairs, *hard)))), source
