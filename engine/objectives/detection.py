"""Detection of objects as a set: learned queries answer with a class and a box each, and are matched with what is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.batch import Batch, Objects, Sample
from engine.models.embedding import LearnedEmbedder
from engine.models.passes import drawn_as
from engine.objectives.parts.baselines import entropy
from engine.objectives.parts.boxes import distance, generalised_overlap, overlap
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.image_alone import IMAGE_ALONE, leave_image_alone
from engine.objectives.parts.normalization import normalizer, widened
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.objectives.parts.other_images import other_images, with_images
from engine.objectives.parts.set_matching import cheapest_matching
from engine.objectives.parts.whole_pictures import require_whole_pictures
from engine.sections import require, require_not_negative, require_positive

BOXES, OVERLAP, ATTRIBUTES = "detected_boxes", "detected_overlap", "detected_attributes"
"""Losses beside that of the classes."""
FOUND = 0.5
"""Overlap from which on a box is that of an object."""


@dataclass
class Answers:
    """What the queries say of every picture."""

    classes: Tensor
    """float32 `[B, Q, C + 1]`: logits, the last of no object."""
    boxes: Tensor
    """float32 `[B, Q, 4]`."""
    attributes: Tensor | None
    """float32 `[B, Q, A]`: logits."""


@dataclass
class Detection(Objective):
    """Object queries, which the decoder takes in place of words, are matched one to one with the objects of the picture at
    the least cost; the others shall say that there is none (DETR).

    Cross-entropy of classes, mean over queries by their weight; of attributes, and distance and overlap of boxes, mean over
    objects. The decoder reads the picture without its text.
    """

    roles: ClassVar[tuple[str, ...]] = ("decoder",)
    needs_objects: ClassVar[bool] = True

    queries: int = 100
    """Object queries, at least as many as a picture has objects."""
    classes: int = 1600
    """Number of classes of the data."""
    attributes: int = 0
    """Number of attributes of the data, of which an object has one at most (0: none are asked for)."""
    no_object: float = 0.1
    """Weight of a query that is matched with nothing."""
    distance: float = 5.0
    """Factor on the distance of boxes, in the loss and in the cost of a match."""
    overlap: float = 2.0
    """Factor on what generalised overlap is less than 1; as distance."""

    def __post_init__(self) -> None:
        require_positive(self, "objectives.detection", "queries", "classes", "no_object")
        require_not_negative(self, "objectives.detection", "attributes", "distance", "overlap")

    def check(self, config: Any) -> None:
        super().check(config)
        decoder = config.model.decoder
        read = decoder.source, decoder.reads
        require(
            read in (("image", "attention"), ("joint", "attention")),
            "objectives.detection asks a decoder that attends to the picture: model.decoder.source must be image or joint and "
            f"reads attention, got {read[0]} and {read[1]}",
        )
        require_whole_pictures(self.name, config.data)

    def prepare(self, sample: Sample, draw: Draw) -> None:
        objects = sample.objects
        require(
            len(objects) <= self.queries,
            f"{len(objects)} objects, more than objectives.detection.queries = {self.queries}",
        )
        for name, numbers in (("classes", objects.classes), ("attributes", objects.attributes)):
            most, largest = getattr(self, name), max(numbers.tolist(), default=-1)
            require(
                largest < most or (name, most) == ("attributes", 0),
                f"number {largest} of the {name}, objectives.detection.{name} is {most}",
            )
        sample.views[self.name] = objects
        leave_image_alone(sample)

    def build_head(self, model: Any) -> nn.Module:
        stack = model.options.decoder
        return ObjectHead(self.queries, stack.embedding_width or stack.width, stack.width, self.classes, self.attributes)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        answers, per_object = self.answers(model, batch), normalizer(batch, self.name)
        sums = self.sums(answers, batch.views[self.name], self.match(answers, batch.views[self.name]))
        factors = {self.name: self._per_weight(batch), BOXES: self.distance * per_object, OVERLAP: self.overlap * per_object}
        return {name: total * factors.get(name, per_object) for name, total in sums.items()}, {}

    def answers(self, model: Any, batch: Batch) -> Answers:
        head, layout = model.heads[self.name], vk.SegmentLayout.joined((self.queries, batch.layout)).select((0,))
        layout = drawn_as(layout, batch, self.name, stage=2)
        read = model.decoder.answer(head.queries, layout, model.decoder_source(batch, IMAGE_ALONE), model.rng)
        return head(read.hidden.view(layout.num_samples, self.queries, -1))

    def match(self, answers: Answers, objects: Objects) -> Tensor:
        """int64 `[M]`: the query of every object, numbered through all pictures."""
        picture, number = objects.layout.token_sample().long(), objects.layout.token_position().long()
        pictures, most = objects.layout.num_samples, objects.layout.max_seqlen
        classes = objects.classes.new_zeros(pictures, most).index_put((picture, number), objects.classes)
        boxes = objects.boxes.new_zeros(pictures, most, 4).index_put((picture, number), objects.boxes)[:, :, None]
        with torch.no_grad():
            said, placed = answers.classes.softmax(2).transpose(1, 2), answers.boxes[:, None]
            costs = -said.gather(1, classes[:, :, None].expand(-1, -1, self.queries))
            costs = costs + self.distance * distance(placed, boxes) - self.overlap * generalised_overlap(placed, boxes)
        query = cheapest_matching(costs, objects.layout.lengths[:, 0])
        return picture * self.queries + query[picture, number]

    def sums(self, answers: Answers, objects: Objects, queries: Tensor) -> dict[str, Tensor]:
        """Every loss, without its factor, over all that it is a mean of."""
        targets = torch.full_like(answers.classes[:, :, 0], self.classes, dtype=torch.int64).flatten()
        targets = targets.index_copy(0, queries, objects.classes)
        weights = torch.full_like(answers.classes[0, 0], 1.0)
        weights[-1] = self.no_object
        losses = {"reduction": "sum", "weight": weights}
        boxes = answers.boxes.flatten(0, 1)[queries]
        sums = {
            self.name: nn.functional.cross_entropy(answers.classes.flatten(0, 1), targets, **losses),
            BOXES: distance(boxes, objects.boxes).sum(),
            OVERLAP: (1 - generalised_overlap(boxes, objects.boxes)).sum(),
        }
        if answers.attributes is not None:
            said = answers.attributes.flatten(0, 1)[queries]
            sums[ATTRIBUTES] = nn.functional.cross_entropy(said, objects.attributes, ignore_index=-1, reduction="sum")
        return sums

    def _per_weight(self, batch: Batch) -> Tensor:
        """1 / the sum of all queries' weights."""
        per_object, per_picture = (torch.as_tensor(normalizer(batch, count)) for count in (self.name, "pairs"))
        objects = torch.where(per_object > 0, 1 / per_object, 0.0)
        return 1 / ((1 - self.no_object) * objects + self.no_object * self.queries / per_picture)

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Each loss; accuracy is the share of objects that are found, by their class and overlapping by half. Beside them what
        answers to other pictures come to, and what the frequencies of classes and the median box do."""
        totals, seen = {"": Counter(), "_shuffled_image": Counter()}, []
        pictures = 0
        for batch in held_out.batches(self.name):
            if (others := other_images(batch.labels)) is None:
                continue
            pictures += len(batch.labels)
            seen.append(objects := batch.views[self.name])
            for beside, one in zip(totals, (batch, with_images(batch, others)), strict=True):
                with model.passes_shared():
                    answers = self.answers(model, one)
                queries = self.match(answers, objects)
                sums = self.sums(answers, objects, queries) | {"accuracy": self._found(answers, objects, queries)}
                totals[beside].update({name: total.item() for name, total in sums.items()})
        require_some(sum(map(len, seen)), "objects beside two different pictures")
        return self._figures(totals, seen, pictures)

    def _found(self, answers: Answers, objects: Objects, queries: Tensor) -> Tensor:
        right = answers.classes.flatten(0, 1)[queries].argmax(1) == objects.classes
        return (right & (overlap(answers.boxes.flatten(0, 1)[queries], objects.boxes) >= FOUND)).sum()

    def _figures(self, totals: dict[str, Counter], seen: list[Objects], pictures: int) -> Figures:
        boxes, classes, attributes = (torch.cat([getattr(one, n) for one in seen]) for n in ("boxes", "classes", "attributes"))
        median, frequencies = boxes.median(0).values, torch.bincount(classes, minlength=self.classes + 1).double()
        frequencies[-1] = self.no_object * (pictures * self.queries - len(classes))
        blind = {
            self.name: {"loss_class_prior": entropy(frequencies)},
            BOXES: {"loss_median_box": distance(boxes, median).mean().item()},
            OVERLAP: {"loss_median_box": 1 - generalised_overlap(boxes, median).mean().item()},
            ATTRIBUTES: {"loss_class_prior": entropy(torch.bincount(attributes[attributes >= 0]).double())},
        }
        counts = dict.fromkeys(blind, len(classes)) | {self.name: frequencies.sum().item()}
        counts[ATTRIBUTES] = int((attributes >= 0).sum())
        figures: Figures = {}
        for group in totals[""]:
            if group != "accuracy":
                beside = {"loss" + other: sums[group] / counts[group] for other, sums in totals.items()}
                figures[group] = beside | blind[group]
        figures[self.name] |= {"accuracy" + other: sums["accuracy"] / len(classes) for other, sums in totals.items()}
        return figures


class ObjectHead(nn.Module):
    """The queries, and what their states are mapped to: classes, attributes, and by three maps a box."""

    def __init__(self, queries: int, query_width: int, width: int, classes: int, attributes: int):
        super().__init__()
        self.queries = LearnedEmbedder(queries, query_width)
        self.classes = nn.Linear(width, classes + 1)
        self.attributes = nn.Linear(width, attributes) if attributes else None
        self.boxes = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4), nn.Sigmoid()
        )

    def forward(self, states: Tensor) -> Answers:
        """Of states `[B, Q, D]`."""
        attributes = None if self.attributes is None else widened(self.attributes(states))
        return Answers(widened(self.classes(states)), widened(self.boxes(states)), attributes)
