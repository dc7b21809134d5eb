"""The update rule, the course of a run, what DeepSpeed partitions, and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.sections.checks import require, require_not_negative, require_positive, require_share


@dataclass
class Rule:
    """What some parameters do otherwise than the rest (null: as the rest)."""

    kind: str | None = None
    """adamw or sgd."""
    lr: float | None = None
    """Peak learning rate."""
    weight_decay: float | None = None
    """Decoupled weight decay; vectors have none."""
    momentum: float | None = None
    """Momentum of sgd."""


@dataclass
class Optimizer:
    """The update rule. ZeRO hands it flat partitions, so only elementwise rules are exact."""

    kind: str = "adamw"
    """adamw or sgd."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of AdamW's two moments."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay; vectors (norms, biases, logit_scale) have none."""
    momentum: float = 0.0
    """Momentum of sgd."""
    clip: float = 1.0
    """Largest norm of the whole gradient (0: no clipping)."""
    rules: dict[str, Rule] = field(default_factory=dict)
    """Other rules by prefix of the parameter name, such as {image.backbone: {kind: sgd, lr: 0.01}}; the longest prefix
    wins."""
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Learning-rate factor by prefix of the parameter name; the longest prefix wins."""
    freeze: list[str] = field(default_factory=list)
    """Prefixes of the names of parameters that are not trained: they have no gradients and no optimizer states."""

    def __post_init__(self) -> None:
        require_elementwise("optimizer.kind", self.kind)
        require_positive(self, "optimizer", "lr", "eps")
        require_not_negative(self, "optimizer", "weight_decay", "clip")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            require_share(f"optimizer.{name}", value)
        for prefix, rule in self.rules.items():
            self._check_rule(f"optimizer.rules.{prefix}", rule)
        for prefix, factor in self.lr_multipliers.items():
            require(factor >= 0, f"optimizer.lr_multipliers.{prefix} must not be negative, got {factor}")

    def _check_rule(self, where: str, rule: Rule) -> None:
        require_elementwise(f"{where}.kind", rule.kind or self.kind)
        require_positive(rule, where, "lr")
        require(
            rule.weight_decay is None or rule.weight_decay >= 0,
            f"{where}.weight_decay must not be negative, got {rule.weight_decay}",
        )
        require_share(f"{where}.momentum", rule.momentum or 0.0)


def require_elementwise(name: str, kind: str) -> None:
    """Refuse a rule that ZeRO would make wrong, or that is not known."""
    layerwise = kind.lower() in ("lamb", "lars", "adafactor")
    why = "needs whole parameters but ZeRO gives it flat partitions" if layerwise else "is not known"
    require(kind in ("adamw", "sgd"), f"{name} {kind!r} {why}: use adamw or sgd")


@dataclass
class Schedule:
    """The learning rate over the steps of the run."""

    kind: Literal["cosine", "linear", "constant", "step", "epoch", "rsqrt"] = "cosine"
    """Shape of the decay after the warm-up: cosine and linear to the end; step, by a factor at some points (VSE++, SOHO);
    epoch, by a factor after every epoch (BLIP); rsqrt, with the inverse square root of the step (T5)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    min_lr_ratio: float = 0.0
    """Share of the peak that is left at the end, at least."""
    factor: float = 0.1
    """What step and epoch multiply the learning rate by."""
    decay_at: tuple[float, ...] = ()
    """Where step does so, as shares of the run: [0.5] is after 15 of 30 epochs."""
    epochs: int = 1
    """Into how many epochs of equal length epoch cuts the run."""
    flat_steps: int = 10_000
    """The first step at which rsqrt falls: the learning rate of step n is sqrt(flat_steps / n) of its peak."""

    def __post_init__(self) -> None:
        require_not_negative(self, "schedule", "warmup_steps")
        require_positive(self, "schedule", "factor", "epochs", "flat_steps")
        ratio = self.min_lr_ratio
        require(0 <= ratio <= 1, f"schedule.min_lr_ratio must be in [0, 1], got {ratio}")
        require(
            list(self.decay_at) == sorted(share for share in self.decay_at if 0 < share < 1),
            f"schedule.decay_at must rise and lie between 0 and 1, got {list(self.decay_at)}",
        )
        require(
            bool(self.decay_at) == (self.kind == "step"),
            f"schedule.decay_at and schedule.kind step need each other, got {list(self.decay_at)} with kind {self.kind}",
        )


@dataclass
class Buckets:
    """Batches of a token budget, of examples of like length (UNITER's token bucket sampler)."""

    tokens: int = 10_240
    """Words and regions of the longest example of a bucket, times the examples of one batch, at most."""
    size: int = 8192
    """Examples, in random order, that are sorted by length together."""
    multiple: int = 8
    """Batches have a multiple of this many examples."""

    def __post_init__(self) -> None:
        require_positive(self, "train.buckets", "tokens", "size", "multiple")


@dataclass
class Train:
    """Length of the run, and what happens how often."""

    global_batch: int = 128
    """Pairs per optimizer step, over all ranks and micro-steps; with train.buckets the number of bucketed batches."""
    buckets: Buckets | None = None
    """Batches of a token budget in place of a number of pairs (null: pairs)."""
    accumulation: int = 1
    """Micro-steps per optimizer step; each rank's micro-batch is global_batch / (ranks * accumulation)."""
    micro_batch: int | None = None
    """Pairs one rank puts through the model at once, in place of accumulation: it takes global_batch /
    (ranks * micro_batch) micro-steps, so that the global batch is free to choose on any number of ranks (null: as
    accumulation says). Where there are several, a contrastive loss is still over the whole global batch; towers are
    then run once more, without a graph."""
    max_steps: int | None = None
    """Optimizer steps of the run."""
    max_pairs: int | None = None
    """Pairs of the run, rounded up to whole steps; the smaller of max_steps and max_pairs counts."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 200
    """Steps between two checkpoints (0: only at the end)."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; at least 2, so that a damaged one has a predecessor."""
    evaluate_every: int = 0
    """Steps between two evaluations during training (0: only at the end)."""
    resume: str = "auto"
    """auto: go on from the run's own newest checkpoint if there is one; never: start again, an existing run
    folder is renamed; otherwise the path of a run folder to go on from."""
    join_timeout: int = 600
    """Seconds the processes of a run wait for each other at the start."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile, from the second step on."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward instead of keeping their activations."""

    def __post_init__(self) -> None:
        counts = ("global_batch", "accumulation", "micro_batch", "log_every", "max_steps", "max_pairs", "join_timeout")
        require_positive(self, "train", *counts)
        require(
            self.micro_batch is None or self.accumulation == 1,
            f"train.accumulation follows from train.micro_batch = {self.micro_batch}: leave it out, got {self.accumulation}",
        )
        require_not_negative(self, "train", "save_every", "evaluate_every")
        require(
            self.keep_checkpoints >= 2,
            f"train.keep_checkpoints must be at least 2, got {self.keep_checkpoints}",
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        from_pairs = None if self.max_pairs is None else -(-self.max_pairs // self.global_batch)
        return min(steps for steps in (self.max_steps, from_pairs) if steps is not None)


@dataclass
class Zero:
    """What DeepSpeed partitions over the ranks."""

    stage: Literal[0, 1, 2, 3] = 1
    """0: nothing; 1: optimizer state; 2: gradients too; 3: parameters too."""


@dataclass
class Evaluation:
    """Evaluation on held-out records."""

    gallery: int = 1000
    """Pairs that are ranked against each other, at most. A joint model has to read every caption with every image:
    at most 100 pairs."""
    batch: int = 64
    """Pairs per forward."""
    rerank_top: int = 16
    """Candidates the matching head re-ranks (0: none)."""
    zero_shot: str | None = None
    """A folder with one sub-folder of images per class, named like the class (null: no such evaluation)."""

    def __post_init__(self) -> None:
        require_positive(self, "evaluation", "gallery", "batch")
        require_not_negative(self, "evaluation", "rerank_top")
