"""The sections of a run's configuration, each validated as it is built.

Every attribute's docstring is what `--help` prints. A recipe is a yaml file of these fields; what it leaves
out keeps the default. Errors name the option as it is written on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_positive(section: Any, prefix: str, *names: str) -> None:
    """Refuse a field of `section` that is given and not above 0."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, f"{prefix}.{name} must be positive, got {value}")


def require_not_negative(section: Any, prefix: str, *names: str) -> None:
    """Refuse a field of `section` below 0."""
    for name in names:
        value = getattr(section, name)
        require(value >= 0, f"{prefix}.{name} must not be negative, got {value}")


def require_share(name: str, value: float) -> None:
    """A probability that may be 0 but not 1 (dropout of everything divides by zero)."""
    require(0.0 <= value < 1.0, f"{name} must be in [0, 1), got {value}")


@dataclass
class Data:
    """Where records come from and how they become tensors."""

    source: str | list[str] = "builtin"
    """Training records: "builtin" (rendered glyphs and their names), "builtin-scenes" (two or three of them),
    "builtin-emoji" (where the Noto font is installed), or img2dataset tar shards as a path, a brace pattern such
    as shards/{00000..00099}.tar, or a list of all these."""
    held_out: str | list[str] = "builtin"
    """Records for evaluation, written like data.source."""
    caption_keys: list[str] = field(default_factory=lambda: ["captions", "caption", "txt"])
    """Where captions are looked for; the first that a record has is used. "txt" is its text file, other names are
    keys of its json, which may hold one caption or a list."""
    max_records: int | None = None
    """Use only the first records of each split (null: all)."""
    image_size: int = 32
    """Side of a square input image in pixels; a multiple of model.image.patch_size."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of the red, green and blue channel (values in 0..1), subtracted from every pixel."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation every channel is divided by."""
    resize: Literal["squash", "shorter", "fit"] = "squash"
    """squash: to the square, whatever the aspect; shorter: the shorter side to image_size, then the centre square;
    fit: the shorter side to image_size, the aspect kept (in whole patches, at most model.image.max_grid), so that
    the number of patches varies."""
    random_crop: Literal["none", "resized", "translate"] = "none"
    """Of training images. resized: a random part, resized to the square; translate: moved by up to image_size / 16."""
    random_crop_scale: tuple[float, float] = (0.5, 1.0)
    """Least and largest share of the area that random_crop "resized" keeps."""
    flip: bool = False
    """Mirror training images at random. Leave it off where captions or glyphs say left and right."""
    workers: int = 0
    """Loader processes per rank (0: load in the training process). They do not change the order."""
    fault_limit: int = 100
    """Distinct faults in the data (broken records are replaced, and all are named) before the run stops."""
    max_image_pixels: int = 64_000_000
    """Larger images are refused as broken records before they are decoded."""
    max_caption_tokens: int = 64
    """Captions are cut to this many tokens, [CLS] and [SEP] included."""
    cache: str = "runs/cache"
    """Folder where the built-in shards and the indices of all shards are kept."""
    permute_captions: bool = False
    """Give every training caption to another image: a control that must learn nothing about held-out pairs."""

    def __post_init__(self) -> None:
        for name in ("source", "held_out", "caption_keys"):
            require(bool(getattr(self, name)), f"data.{name} is empty")
        require_positive(self, "data", "image_size", "max_image_pixels", "max_records")
        require_not_negative(self, "data", "workers", "fault_limit")
        require(min(self.image_std) > 0, f"data.image_std must be positive, got {list(self.image_std)}")
        low, high = self.random_crop_scale
        require(0 < low <= high <= 1, f"data.random_crop_scale must rise within (0, 1], got {[low, high]}")
        limit = self.max_caption_tokens
        require(limit >= 3, f"data.max_caption_tokens must be at least 3, got {limit}")


@dataclass
class Tokenizer:
    """How captions become ids."""

    kind: Literal["wordpiece", "bpe", "unigram"] = "wordpiece"
    """The model that is trained on the training captions when no path is given."""
    vocab_size: int = 4096
    """Largest vocabulary to train."""
    path: str | None = None
    """A tokenizer.json to load instead of training one."""
    lowercase: bool = True
    """Lower-case captions first."""

    def __post_init__(self) -> None:
        require(self.vocab_size >= 16, f"tokenizer.vocab_size must be at least 16, got {self.vocab_size}")


@dataclass
class Stack:
    """One transformer: `layers` blocks of attention and a feed-forward network."""

    section: ClassVar[str] = "*"

    width: int = 128
    """Hidden size D."""
    layers: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads; must divide the width."""
    mlp_width: int = 512
    """Hidden size of the feed-forward network."""
    norm: Literal["pre", "post"] = "pre"
    """Where LayerNorm stands: before each sub-layer (ViT, GPT) or after each residual sum (BERT)."""
    eps: float = 1e-5
    """Added to the variance in LayerNorm."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu_tanh"
    """Non-linearity of the feed-forward network."""
    dropout: float = 0.0
    """Dropout after embeddings and sub-layers."""
    attention_dropout: float = 0.0
    """Dropout of attention probabilities."""

    def __post_init__(self) -> None:
        where = f"model.{self.section}"
        require_positive(self, where, "width", "layers", "heads", "mlp_width", "eps")
        require(
            self.width % self.heads == 0,
            f"{where}.heads must divide {where}.width = {self.width}, got {self.heads}",
        )
        require_share(f"{where}.dropout", self.dropout)
        require_share(f"{where}.attention_dropout", self.attention_dropout)


@dataclass
class ImageStack(Stack):
    """The image tower."""

    section: ClassVar[str] = "image"

    patch_size: int = 8
    """Side of a square patch in pixels."""
    max_grid: tuple[int, int] = (4, 4)
    """Rows and columns of the learned position table: the largest grid of patches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "model.image", "patch_size")


@dataclass
class TextStack(Stack):
    """The text tower."""

    section: ClassVar[str] = "text"

    layers: int = 2
    """Number of blocks."""
    max_positions: int = 64
    """Size of the learned position table: the longest caption in tokens."""


@dataclass
class FusionStack(Stack):
    """The fusion encoder over image and text."""

    section: ClassVar[str] = "fusion"

    layers: int = 2
    """Number of blocks."""
    cross_every: int = 1
    """Every how many blocks the text attends to the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "model.fusion", "cross_every")


@dataclass
class Model:
    """Two towers and a fusion encoder."""

    image: ImageStack = field(default_factory=ImageStack)
    """The image tower."""
    text: TextStack = field(default_factory=TextStack)
    """The text tower."""
    fusion: FusionStack = field(default_factory=FusionStack)
    """The fusion encoder, used by matching and masked_language."""
    projection_dim: int = 128
    """Size of the features the contrastive score compares."""
    logit_scale_init: float = 1 / 0.07
    """Initial factor on the cosine similarities."""
    logit_scale_max: float = 100.0
    """The factor never grows past this."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        require_positive(self, "model", "projection_dim", "logit_scale_init")
        require(
            self.logit_scale_init <= self.logit_scale_max,
            f"model.logit_scale_init must not exceed model.logit_scale_max = {self.logit_scale_max}, "
            f"got {self.logit_scale_init}",
        )


@dataclass
class Contrastive:
    """Image-text contrastive loss (ITC)."""

    weight: float = 1.0
    """Factor in the total loss."""
    negatives: Literal["global", "local"] = "global"
    """global: against the pairs of all ranks; local: against this rank's own."""


@dataclass
class Matching:
    """Image-text matching with hard negatives (ITM)."""

    weight: float = 1.0
    """Factor in the total loss."""
    negatives: Literal["global", "local"] = "global"
    """Where hard negatives are drawn from."""
    hardness: float = 1.0
    """Factor on the contrastive scores that negatives are drawn by. 1: as often as the contrastive softmax confuses
    them, so the loss has nothing to learn until fusion knows more than the towers; 0: all alike."""

    def __post_init__(self) -> None:
        require_not_negative(self, "objectives.matching", "hardness")


@dataclass
class MaskedLanguage:
    """Masked-language modelling of the caption beside its image (MLM)."""

    weight: float = 1.0
    """Factor in the total loss."""
    probability: float = 0.15
    """Share of tokens that are predicted."""
    whole_word: bool = False
    """Select whole words instead of single tokens."""

    def __post_init__(self) -> None:
        require_share("objectives.masked_language.probability", self.probability)


@dataclass
class Objectives:
    """The losses; null leaves one out."""

    contrastive: Contrastive | None = field(default_factory=Contrastive)
    """Image-text contrastive loss (ITC)."""
    matching: Matching | None = field(default_factory=Matching)
    """Image-text matching with hard negatives (ITM)."""
    masked_language: MaskedLanguage | None = field(default_factory=MaskedLanguage)
    """Masked-language modelling of the caption beside its image (MLM)."""

    def __post_init__(self) -> None:
        require(bool(self.active), "objectives: at least one must be given")

    @property
    def active(self) -> list[str]:
        """Names of the objectives the run has."""
        return [name for name, options in vars(self).items() if options is not None]

    @property
    def batch_coupled(self) -> list[str]:
        """Names of the active objectives whose value depends on which pairs share a batch."""
        return [name for name in self.active if name in ("contrastive", "matching")]


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
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Learning-rate factor by prefix of the parameter name; the longest prefix wins."""

    def __post_init__(self) -> None:
        layerwise = self.kind.lower() in ("lamb", "lars", "adafactor")
        why = "needs whole parameters but ZeRO gives it flat partitions" if layerwise else "is not known"
        require(self.kind in ("adamw", "sgd"), f"optimizer.kind {self.kind!r} {why}: use adamw or sgd")
        require_positive(self, "optimizer", "lr", "eps")
        require_not_negative(self, "optimizer", "weight_decay", "clip")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            require_share(f"optimizer.{name}", value)
        for prefix, factor in self.lr_multipliers.items():
            require(factor >= 0, f"optimizer.lr_multipliers.{prefix} must not be negative, got {factor}")


@dataclass
class Schedule:
    """The learning rate over the steps of the run."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    min_lr_ratio: float = 0.0
    """Share of the peak that is left at the end."""

    def __post_init__(self) -> None:
        require_not_negative(self, "schedule", "warmup_steps")
        ratio = self.min_lr_ratio
        require(0 <= ratio <= 1, f"schedule.min_lr_ratio must be in [0, 1], got {ratio}")


@dataclass
class Train:
    """Length of the run, and what happens how often."""

    global_batch: int = 128
    """Pairs per optimizer step, over all ranks and micro-steps."""
    accumulation: int = 1
    """Micro-steps per optimizer step; each rank's micro-batch is global_batch / (ranks * accumulation)."""
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
    compile: bool = False
    """Compile the transformer blocks with torch.compile, from the second step on."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward instead of keeping their activations."""

    def __post_init__(self) -> None:
        require_positive(self, "train", "global_batch", "accumulation", "log_every", "max_steps", "max_pairs")
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
    """Pairs that are ranked against each other, at most."""
    batch: int = 64
    """Pairs per forward."""
    rerank_top: int = 16
    """Candidates the matching head re-ranks (0: none)."""
    zero_shot: str | None = None
    """A folder with one sub-folder of images per class, named like the class (null: no such evaluation)."""

    def __post_init__(self) -> None:
        require_positive(self, "evaluation", "gallery", "batch")
        require_not_negative(self, "evaluation", "rerank_top")
