"""Masked visual modelling (SOHO): which code of the visual dictionary was hidden?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vlkernels as vk
from torch import Tensor
from torch.nn import functional as F

from engine.batch import Batch, HiddenCodes, Places, Sample
from engine.objectives.parts.baselines import ClassPrior
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer, widened
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.sections import require, require_positive

UNHIDDEN = -100


@dataclass
class MaskedVisualCodes(Objective):
    """Masked visual modelling (MVM): all cells of a picture that have the code of a drawn one are hidden.

    Cross-entropy of that code by the cosine similarities of a hidden cell's state and all codes; mean over the pictures of
    the mean over their hidden cells, whose number only the model finds.
    """

    roles: ClassVar[tuple[str, ...]] = ("joint",)

    scale: float = 1.0
    """Multiplies the cosine similarities. At 1, as released, n codes cost at least ln(1 + (n - 1) / e^2) nats, however well
    they are told: 5.6 of 2,048."""

    def __post_init__(self) -> None:
        require_positive(self, "objectives.masked_visual_codes", "scale")

    def check(self, config: Any) -> None:
        super().check(config)
        image = config.model.joint.image
        require(
            image is not None and image.codes > 0,
            "objectives.masked_visual_codes hides codes of a visual dictionary: give model.joint.image.codes",
        )

    def prepare(self, sample: Sample, draw: Draw) -> None:
        drawn = draw.random.integers(len(sample.image), size=1)
        sample.views[self.name] = HiddenCodes(Places.of_sample(drawn))

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        states, codes, targets = self._asked(model, batch)
        losses = vk.linear_cross_entropy(
            self.scale * states, codes, targets, ignore_index=UNHIDDEN, reduction="none", impl=model.impl
        )
        total = (losses * shares(targets != UNHIDDEN, batch.image_layout)).sum()
        return {self.name: total * normalizer(batch, self.name)}, {}

    def _asked(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of unit length the states `[N, D]` of all cells and the codes `[K, D]`; int64 `[N]` which was hidden, if any."""
        read = model.joint_states(batch, self.name)
        states = vk.take_segments(read.hidden, read.layout, (model.joint.segment("image"),), impl=model.impl)
        index, hidden = model.cells(batch).codes, model.hidden_cells(batch, self.name)
        states, codes = (F.normalize(widened(rows), dim=1) for rows in (states, model.joint.image.dictionary.codebook.codes))
        return states, codes.to(states.dtype), torch.where(hidden, index, UNHIDDEN)

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Cross-entropy and accuracy, and those of how often each code is drawn; how many codes there are at all."""
        loss, right, prior, seen = 0.0, 0.0, ClassPrior(), set()
        for batch in held_out.batches(self.name):
            with model.passes_shared():
                loss += self(model, batch)[0][self.name].item()
                states, codes, targets = self._asked(model, batch)
                index = model.cells(batch).codes
            found = (states @ codes.T).argmax(1) == targets
            right += (found * shares(targets != UNHIDDEN, batch.image_layout)).sum().item()
            drawn = index[batch.views[self.name].places.rows(batch.image_layout)]
            prior.add(F.one_hot(drawn, len(codes)))
            seen.update(index.tolist())
        require_some(prior.count, "pictures")
        figures = {"loss": loss / prior.count, "loss_class_prior": prior.divergence, "accuracy": right / prior.count}
        return {self.name: figures | {"accuracy_majority": prior.largest_share, "codes": float(len(seen))}}


def shares(hidden: Tensor, layout: vk.SegmentLayout) -> Tensor:
    """float32 `[N]`: of each hidden cell, so that those of a picture add up to 1; 0 of others."""
    picture = layout.token_sample().long()
    counts = torch.zeros(layout.num_samples, device=hidden.device).index_add(0, picture, hidden.float())
    return hidden / counts[picture]
