"""Sizes and options of the transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from engine.sections.checks import require, require_positive, require_share


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
class JointStack(Stack):
    """One transformer over text and image together."""

    section: ClassVar[str] = "joint"

    max_positions: int = 64
    """Size of the learned position table: the longest caption in tokens."""


@dataclass
class Model:
    """Either two towers and a fusion encoder, or one joint transformer."""

    image: ImageStack | None = field(default_factory=ImageStack)
    """The image tower."""
    text: TextStack | None = field(default_factory=TextStack)
    """The text tower."""
    fusion: FusionStack | None = field(default_factory=FusionStack)
    """The fusion encoder, used by matching and masked_language."""
    joint: JointStack | None = None
    """One transformer over text and image together, in place of the other three (which are then null)."""
    projection_dim: int = 128
    """Size of the features the contrastive score compares."""
    logit_scale_init: float = 1 / 0.07
    """Initial factor on the cosine similarities."""
    logit_scale_max: float = 100.0
    """The factor never grows past this."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        towers = {name: getattr(self, name) for name in ("image", "text", "fusion")}
        wrong = [name for name, tower in towers.items() if (tower is None) == (self.joint is None)]
        others = ", ".join(f"model.{name}" for name in wrong)
        require(
            not wrong,
            f"model.joint takes the place of {others}: set them to null"
            if self.joint is not None
            else f"{others} must be given where model.joint is null",
        )
        require_positive(self, "model", "projection_dim", "logit_scale_init")
        require(
            self.logit_scale_init <= self.logit_scale_max,
            f"model.logit_scale_init must not exceed model.logit_scale_max = {self.logit_scale_max}, "
            f"got {self.logit_scale_init}",
        )
