"""The one description of a run: `Config`, built from the sections, with the rules that span them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from engine.objectives import Objectives
from engine.sections import (
    Data,
    Evaluation,
    ImageInput,
    Model,
    Optimizer,
    Schedule,
    System,
    Texts,
    Tokenizer,
    Train,
    Zero,
    require,
)

TINY = {
    **{f"model.{stack}.{name}": cap for stack in ("image", "text", "fusion", "joint", "decoder", "generator")
       for name, cap in (("width", 32), ("layers", 2), ("heads", 2), ("mlp_width", 64))},
    **{f"model.co_attention.{name}": cap for name, cap in (("width", 48), ("layers", 2), ("heads", 2))},
    "model.projection_dim": 32,
    "model.momentum": 0.9,
    "model.image.patch_size": 8,
    "model.joint.image.patch_size": 8,
    "model.joint.image.codes": 64,
    "objectives.masked_patches.width": 32,
    "objectives.masked_patches.layers": 2,
    "objectives.masked_patches.heads": 2,
    "data.image_size": 32,
    "tokenizer.vocab_size": 512,
    "tokenizer.sentinels": 128,
    "data.max_records": 256,
    "data.max_caption_tokens": 64,
    "data.texts.per_step": 4,
    "data.workers": 0,
    "train.global_batch": 12,
    "train.buckets.tokens": 256,
    "train.buckets.size": 64,
    "train.buckets.multiple": 2,
    "train.max_steps": 12,
    "train.log_every": 2,
    "train.save_every": 6,
    "objectives.momentum_contrastive.queue": 96,
    "objectives.detection.queries": 16,
    "objectives.flat_sequence.bins": 128,
    "schedule.warmup_steps": 4,
    "schedule.flat_steps": 4,
    "evaluation.gallery": 64,
    "evaluation.rerank_top": 4,
}
"""What `--tiny true` caps, and at how much, where the run has it."""
TINY_STAGES = 2
"""Of a backbone: a tiny picture still has 4 x 4 cells."""


@dataclass
class Config:
    """A pretraining run."""

    name: str = "run"
    """Name of the run; its folder is OUTPUT/NAME."""
    system: System | None = None
    """The published system that a recipe reproduces (null: none)."""
    output: str = "runs"
    """Folder that holds the run folders."""
    seed: int = 0
    """Decides initial weights, the order of records, crops, corruption and dropout."""
    tiny: bool = False
    """Cap widths, layers, vocabulary, data and steps so that the recipe runs on two CPU cores in seconds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of weights and activations; the optimizer always keeps fp32 weights."""
    init_from: dict[str, str] = field(default_factory=dict)
    """Weights a new run begins with: folders as `transformers` saves them, or of finished runs, by role, such as
    {image: vit-base, text: bert-base-uncased}; {model: FOLDER} fills every role that the folder has something for, {teacher:
    FOLDER} the teacher of a distillation."""
    impl: Literal["auto", "reference"] = "auto"
    """auto: of every vlkernels op the fastest implementation that serves the call; reference: plain PyTorch."""
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    model: Model = field(default_factory=Model)
    objectives: Objectives = field(default_factory=Objectives)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    zero: Zero = field(default_factory=Zero)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        if self.tiny:
            self._shrink()
        plain = self.name not in ("", ".", "..") and "/" not in self.name
        require(plain, f"name must be the name of a folder, got {self.name!r}")
        require(bool(self.objectives.active), "objectives: at least one must be given; --config RECIPE gives those of a system")
        self._check_shapes()
        self._check_tasks()
        if self.data.texts is not None:
            self._check_texts(self.data.texts)
        self._check_steps()
        self._check_precision()

    @property
    def folder(self) -> str:
        """The run folder."""
        return f"{self.output}/{self.name}"

    def option(self, path: str) -> Any:
        """An option by its dotted name; None inside a section that is null."""
        return functools.reduce(lambda inner, part: inner and getattr(inner, part), path.split("."), self)

    def micro_batch(self, world: int) -> int:
        """Pairs (or bucketed batches) one of `world` ranks takes per micro-step."""
        size = self.train.global_batch // (world * self.micro_steps(world))
        enough = self.data.texts is None or size > 1  # ranks must run the same modules, so all need an image
        require(enough, f"data.texts needs micro-batches of at least 2, got {size}")
        return size

    def micro_steps(self, world: int) -> int:
        """Micro-batches that each of `world` ranks takes per optimizer step."""
        train = self.train
        name = "accumulation" if train.micro_batch is None else "micro_batch"
        given = getattr(train, name)
        require(
            train.global_batch % (world * given) == 0,
            f"train.global_batch must be divisible by ranks * train.{name} = {world} * {given}, got {train.global_batch}",
        )
        steps = given if train.micro_batch is None else train.global_batch // (world * given)
        self._check_micro_steps(steps)
        return steps

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, as written to yaml and json."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The whole run as a recipe that parses back to this configuration."""
        return yaml.safe_dump(_plain(self.as_dict()), sort_keys=False)

    def _shrink(self) -> None:
        for name, section in vars(self).items():
            setattr(self, name, copy.deepcopy(section))  # what the caller passed stays as it was
        batch = self.train.global_batch
        for path, cap in TINY.items():
            section_path, _, name = path.rpartition(".")
            if (section := self.option(section_path)) is not None:
                value = getattr(section, name)
                setattr(section, name, cap if value is None else min(value, cap))
        self._shrink_backbone()
        self._shrink_micro_batch(batch)
        if self.data.tiny_source is not None:
            self.data.source = self.data.held_out = self.data.tiny_source
            for one in (self.data.sets or {}).values():
                one.source = self.data.tiny_source
            if self.data.texts is not None:
                self.data.texts.source = Texts().source

    def _shrink_backbone(self) -> None:
        picture = self.model.reads_pictures
        if picture is None:
            return
        pyramid = picture.backbone.endswith("_fpn")
        picture.backbone, picture.stages = ("resnet18_fpn", None) if pyramid else ("resnet18", TINY_STAGES)
        if picture.kind == "grid":
            cells = self.data.image_size // picture.cell_side
            picture.max_grid = tuple(max(1, min(side, cells)) for side in picture.max_grid)

    def _shrink_micro_batch(self, batch: int) -> None:
        """Cut the tiny global batch into as many parts as `batch` was, or the most of them that divide both."""
        train = self.train
        if train.micro_batch is not None and batch % train.micro_batch == 0:
            train.micro_batch = train.global_batch // math.gcd(train.global_batch, batch // train.micro_batch)

    def _check_shapes(self) -> None:
        model, data = self.model, self.data
        texts = {name: getattr(model, name) for name in ("text", "joint")}
        for name, text in texts.items():
            require(
                text is None or data.max_caption_tokens <= text.max_positions,
                f"data.max_caption_tokens must not exceed model.{name}.max_positions = {text and text.max_positions}, "
                f"got {data.max_caption_tokens}",
            )
        self._check_writer()
        picture, where = model.reads_pictures, "model.image" if model.image is not None else "model.joint.image"
        regions = picture is not None and picture.kind == "regions"
        require(
            regions == (data.regions is not None),
            f"data.regions is what {where}.kind regions reads: give both or neither",
        )
        if picture is not None and picture.kind == "patches":
            self._check_grid(picture, where)

    def _check_writer(self) -> None:
        decoder, words, regions = self.model.decoder, self.data.max_caption_tokens, self.data.regions
        if decoder is None or decoder.positions == "none":
            return
        longest = words + self.model.prefix_tokens(words, regions and regions.max_count)
        require(
            longest <= decoder.max_positions,
            f"data.max_caption_tokens and what stands before a text, {longest} tokens, must not exceed "
            f"model.decoder.max_positions = {decoder.max_positions}",
        )

    def _check_grid(self, picture: ImageInput, where: str) -> None:
        size = self.data.image_size
        require(
            size % picture.patch_size == 0,
            f"data.image_size must be a multiple of {where}.patch_size = {picture.patch_size}, got {size}",
        )
        side = size // picture.patch_size
        require(
            min(picture.max_grid) >= side,
            f"{where}.max_grid must hold data.image_size / patch_size = {side} rows and columns, "
            f"got {list(picture.max_grid)}",
        )

    def _check_tasks(self) -> None:
        active, sets = self.objectives.active, self.data.sets
        for objective in active.values():
            objective.check(self)
        require(
            self.model.compares_towers or self.evaluation.zero_shot is None,
            "evaluation.zero_shot compares features of two towers: give model.image and model.text, or set it to null",
        )
        if sets is None:
            alone = [f"objectives.{name}" for name, objective in active.items() if objective.alone]
            require(
                len(active) == 1 or not alone,
                f"{' and '.join(alone)} cannot share batches: give every objective its task in data.sets",
            )
            return
        served = {task for one in sets.values() for task in one.tasks}
        unknown, idle = sorted(served - active.keys()), sorted(active.keys() - served)
        require(not unknown, f"data.sets: tasks must be objectives of the run, got {', '.join(unknown)}")
        require(not idle, f"data.sets: no set has the task {', '.join(idle)}")

    def _check_texts(self, texts: Texts) -> None:
        joint, pairs = self.model.joint, "data.texts stands beside the pairs of data.source: "
        require(self.data.sets is None and self.data.regions is None, f"{pairs}leave out data.sets and data.regions")
        require(
            joint is not None and joint.text and joint.image is not None and not joint.image.class_token,
            f"{pairs}model.joint must read text and image, and have no class token, which a text without image has not",
        )
        refused = [f"objectives.{name}" for name, one in self.objectives.active.items() if not one.without_images]
        require(not refused, f"{pairs}{' and '.join(refused)} is for samples that all have an image")
        require(
            2 * texts.per_step <= self.train.global_batch,
            f"data.texts.per_step must be at most half of train.global_batch = {self.train.global_batch}, got {texts.per_step}",
        )

    def _check_steps(self) -> None:
        train = self.train
        self._check_micro_steps(train.accumulation)
        require(
            train.buckets is None or (train.max_steps is not None and train.max_pairs is None),
            "train.buckets makes batches of uneven size: say with train.max_steps how long the run is, not with "
            "train.max_pairs",
        )
        require(
            train.buckets is None or self.data.regions is not None,
            "train.buckets needs the lengths of all examples before they are read, which data.regions gives",
        )
        require(
            train.max_steps is not None or train.max_pairs is not None,
            "train.max_steps or train.max_pairs must say how long the run is",
        )

    def _check_micro_steps(self, micro_steps: int) -> None:
        for objective in self.objectives.active.values():
            objective.check_micro_steps(micro_steps)

    def _check_precision(self) -> None:
        require(
            self.zero.stage < 3 or not self.train.compile,
            "train.compile with zero.stage 3 compiles DeepSpeed's hooks, minutes without a gain: use zero.stage 2",
        )
        require(
            self.zero.stage > 0 or self.precision == "fp32",
            f"zero.stage 0 with precision {self.precision} makes a wrong first update in DeepSpeed: "
            "use zero.stage 1",
        )
        require(
            self.precision != "fp16" or self.device != "cpu",
            "precision fp16 needs a GPU: on a cpu use bf16 or fp32",
        )


def _plain(value: Any) -> Any:
    """The same value with lists for tuples, which yaml's safe form does not know."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
