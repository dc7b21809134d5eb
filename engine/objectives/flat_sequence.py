"""Everything in one causal sequence: a picture, numbers as words of their own, and a text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.batch import Batch, Places, Sample, Words
from engine.models.transformer import Tokens
from engine.objectives.parts.baselines import Unigrams
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import widened
from engine.objectives.parts.objective import Draw
from engine.objectives.parts.other_images import other_images, with_images
from engine.objectives.parts.whole_pictures import require_whole_pictures
from engine.objectives.parts.writing import NextWords, WritingObjective
from engine.sections import require, require_positive

READ = "flat_sequence_read"
"""The view that is read: [CLS], numbers, words."""
PER_OBJECT = 4


@dataclass
class NextTokens(NextWords):
    """What is to be said next, some of it numbers."""

    numbers: Tensor
    """bool [M]."""


@dataclass
class FlatSequence(WritingObjective):
    """Behind the picture, where in it each of its objects is, and then the caption: each token from all before it (Gato).

    Numbers are cut into bins, each of which is an id of its own, the tokenizer's sentinels. Mean over numbers and words;
    nothing of the picture is predicted.
    """

    roles: ClassVar[tuple[str, ...]] = ("joint",)
    needs_objects: ClassVar[bool] = True

    bins: int = 1024
    """Of equal width from 0 to 1."""
    objects: int = 16
    """Most objects of a picture; each is four numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "objectives.flat_sequence", "bins", "objects")

    def check(self, config: Any) -> None:
        super().check(config)
        joint, sentinels = config.model.joint, config.tokenizer.sentinels
        require(
            joint.text and joint.image is not None and joint.mask == "causal",
            f"objectives.flat_sequence needs text and image in model.joint and its mask causal, got {joint.mask}",
        )
        require(
            config.tokenizer.path is not None or sentinels >= self.bins,
            "objectives.flat_sequence.bins are ids of their own: tokenizer.sentinels must be "
            f"{self.bins} at least, got {sentinels}",
        )
        longest = config.data.max_caption_tokens + PER_OBJECT * self.objects
        require(
            longest <= joint.max_positions,
            f"numbers of objectives.flat_sequence.objects and a caption are up to {longest} tokens, more than "
            f"model.joint.max_positions = {joint.max_positions}",
        )
        require_whole_pictures(self.name, config.data)

    def prepare(self, sample: Sample, draw: Draw) -> None:
        boxes, text = sample.objects.boxes.numpy(), sample.text.ids
        require(
            len(boxes) <= self.objects,
            f"{len(boxes)} objects, more than objectives.flat_sequence.objects = {self.objects}",
        )
        known = len(draw.tokenizer.sentinel_ids)
        require(known >= self.bins, f"the tokenizer has {known} sentinels, objectives.flat_sequence.bins is {self.bins}")
        numbers = draw.tokenizer.sentinel_ids[bins_of(boxes.flatten(), self.bins)]
        ids = np.concatenate((text[:1], numbers, text[1:]))
        sample.views[READ] = Words(ids, np.full(len(ids), -1))
        places = Places.of_sample(np.arange(len(ids) - 1))
        sample.views[self.name] = NextTokens(places, torch.from_numpy(ids[1:]), torch.arange(len(places)) < len(numbers))

    def mask_of_joint(self, joint: Any) -> str:
        return "causal"

    def writer(self, model: Any) -> str:
        return "joint"

    def written(self, model: Any, batch: Batch) -> tuple[Tokens, int]:
        return model.joint_states(batch, READ), model.joint.segment("text")

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Cross-entropy of all tokens, and of numbers and words alone, beside another picture's and that of how often each is
        said."""
        table = model.words_of("joint")
        totals: dict[str, Counter] = {self.name: Counter(), "flat_numbers": Counter(), "flat_words": Counter()}
        unigrams = {group: Unigrams(len(table)) for group in totals}
        for batch in held_out.batches(self.name):
            if (others := other_images(batch.labels)) is None:
                continue
            view = batch.views[self.name]
            groups = dict(zip(totals, (torch.ones_like(view.numbers), view.numbers, ~view.numbers), strict=True))
            for group, chosen in groups.items():
                unigrams[group].add(view.targets[chosen])
            for beside, one in (("loss", batch), ("loss_shuffled_image", with_images(batch, others))):
                with model.passes_shared():
                    logits = widened(model.heads[self.name].logits(self.states(model, one), table))
                losses = F.cross_entropy(logits, view.targets, reduction="none")
                for group, chosen in groups.items():
                    totals[group][beside] += losses[chosen].sum().item()
        require_some(unigrams["flat_numbers"].count, "objects beside two different pictures")
        figures: Figures = {}
        for group, sums in totals.items():
            figures[group] = {name: total / unigrams[group].count for name, total in sums.items()}
            figures[group]["loss_unigram"] = unigrams[group].entropy
        return figures


def bins_of(values: np.ndarray, bins: int) -> np.ndarray:
    """int64: of numbers from 0 to 1, the last bin with its upper end.

    >>> bins_of(np.asarray([0.0, 0.2499, 0.25, 1.0]), 4).tolist()
    [0, 0, 1, 3]
    """
    return np.clip(np.floor(values * bins), 0, bins - 1).astype(np.int64)
