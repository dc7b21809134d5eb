"""An objective is one file of this package: options, preparation of samples, head, loss and measure of one loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from engine.batch import Batch, Sample
from engine.corruption.words import Vocabulary
from engine.objectives.parts.held_out import Figures, HeldOut
from engine.sections import require

Losses = dict[str, Tensor]
Report = dict[str, Tensor]


class Tokens(Vocabulary, Protocol):
    """What objectives ask of the tokenizer."""

    cls_id: int
    sep_id: int
    full_stop_id: int | None
    """Of a token that is a full stop and no more."""
    vocab_size: int


class Draw:
    """What an objective prepares one sample with."""

    def __init__(self, tokenizer: Tokens, make_random: Callable[[], np.random.Generator]) -> None:
        self.tokenizer = tokenizer
        self._make_random = make_random

    @functools.cached_property
    def random(self) -> np.random.Generator:
        """Drawn from by this objective for this sample alone."""
        return self._make_random()


@dataclass
class Objective:
    """Its fields are its options in a recipe. Its name there, in logs and in checkpoints is that of its file.

    An instance is called with (model, batch) and gives named losses and a report. A loss is a local sum times
    `normalizer(batch, COUNT)`, so that the mean over ranks and micro-steps is the mean over all that is counted in the
    optimizer step.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]] = ()
    """Sections of `model` it reads; "fusion or joint" asks for one of the two."""
    alone: ClassVar[bool] = False
    """Whether its batches are for no other objective, because they show something else."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Objectives whose views its `prepare` looks at, where a sample has them."""
    without_images: ClassVar[bool] = False
    """Whether samples of a batch may have no image where others have one."""
    reads_scale: ClassVar[bool] = False
    """Whether the model's learned factor multiplies its similarities."""
    needs_soft_labels: ClassVar[bool] = False
    """Whether it reads the detector's distributions over classes."""
    needs_objects: ClassVar[bool] = False
    """Whether it reads what the picture shows and where."""
    reads_whole: ClassVar[str | None] = None
    """A view of another objective that it reads all states of, in batches that have it."""
    head: ClassVar[str]
    """Name of its head in `model.heads`: its own, unless it shares another objective's."""

    weight: float = 1.0
    """Factor in the total loss."""

    def __init_subclass__(cls) -> None:
        cls.name = cls.__module__.rpartition(".")[2]
        if "head" not in vars(cls):
            cls.head = cls.name

    @property
    def taught_by(self) -> tuple[str, ...]:
        """Modules of the model whose momentum copies it learns from, as far as the model has them."""
        return ()

    @property
    def replaced_images(self) -> float:
        """Share of the samples that show the image of another one."""
        return 0.0

    @property
    def dropped_images(self) -> float:
        """Share of the samples that show no image at all; of pages."""
        return 0.0

    def mask_of_joint(self, joint: Any) -> str:
        """The mask table under which it reads the joint stream, of which this is the section."""
        return joint.mask

    def check(self, config: Any) -> None:
        """Refuse a run that this objective cannot be part of; `config` is the whole of it."""
        for role in self.roles:
            sections = role.split(" or ")
            names = " or ".join(f"model.{name}" for name in sections)
            given = any(getattr(config.model, name) is not None for name in sections)
            require(given, f"objectives.{self.name} needs {names}")
        require(
            not {"image", "text"} <= set(self.roles) or config.model.compares_towers,
            f"objectives.{self.name} compares features of towers, which model.co_attention lets read each other",
        )
        require(
            not self.reads_scale or config.model.logit_scale_init is not None,
            f"objectives.{self.name} multiplies similarities by a learned factor: model.logit_scale_init must not be null",
        )

    def check_micro_steps(self, micro_steps: int) -> None:
        """Refuse so many micro-batches per rank and optimizer step."""

    def prepare(self, sample: Sample, draw: Draw) -> None:
        """Add to `sample.views`, under the own name, what the loss reads and the data do not give."""

    def build_head(self, model: Any) -> nn.Module | None:
        """The modules that belong to this loss alone; `model.heads` keeps them."""
        return None

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        raise NotImplementedError

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Figures by group. Beside NAME of a group, NAME_OTHER is what to compare it with: what can be had blindly."""
        return {}


def add_heads(model: Any, objectives: dict[str, Objective]) -> None:
    """Give the model the heads of these objectives, freshly initialised from torch's generator, and tell it which
    passes they share."""
    for objective in objectives.values():
        if objective.reads_whole is not None:
            model.read_whole[objective.reads_whole] = objective.name
        if objective.head not in model.heads and (head := objective.build_head(model)) is not None:
            model.add_head(objective.head, head)
