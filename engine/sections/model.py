"""Sizes and options of a transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from engine.sections.checks import require, require_positive, require_share


@dataclass
class Distances:
    """A learned bias of attention scores for every head and bucket of distances, as T5 has it."""

    count: int = 32
    """Number of buckets: one per distance near 0, then ever wider ones."""
    max_distance: int = 128
    """Distances from here on share a bucket."""
    bidirectional: bool = True
    """Keys behind the query have buckets of their own; else (a causal decoder) they share that of distance 0."""

    def __post_init__(self) -> None:
        directions = 2 if self.bidirectional else 1
        fewest, nearest = 2 * directions, self.count // directions // 2 + 1
        require(
            self.count >= fewest and self.max_distance >= nearest,
            f"buckets of distances must be at least {fewest} and reach at least {nearest}, got a count of {self.count} "
            f"and a max_distance of {self.max_distance}",
        )


@dataclass
class Stack:
    """One transformer: `layers` blocks of attention and a feed-forward network."""

    section: ClassVar[str] = "*"
    least_layers: ClassVar[int] = 1

    width: int = 128
    """Hidden size D."""
    layers: int = 4
    """Number of blocks."""
    heads: int = 4
    """Attention heads; must divide the width."""
    mlp_width: int = 512
    """Hidden size of the feed-forward network."""
    norm: Literal["pre", "post"] = "pre"
    """Where the norm stands: before each sub-layer (ViT, GPT-2, T5) or after each residual sum (BERT)."""
    norm_kind: Literal["layer", "rms"] = "layer"
    """LayerNorm, or RMSNorm (T5): neither centered nor biased."""
    final_norm: bool = True
    """Whether a norm follows the last block where norms stand before the sub-layers."""
    eps: float = 1e-5
    """Added to the variance in norms."""
    biases: Literal["all", "no_key", "none"] = "all"
    """Which linear maps of the blocks have one: all, all but that to self-attention's keys (LayoutLMv2), none (T5)."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu_tanh"
    """Non-linearity of the feed-forward network."""
    gated: bool = False
    """A second map of the feed-forward network's input multiplies its hidden values (T5 1.1)."""
    shared: bool = False
    """All layers are one block (ALBERT)."""
    softmax_scale: float | None = None
    """Multiplies attention scores: by default 1 / sqrt(width of a head); T5's is 1."""
    relative_position: Distances | None = None
    """Bias of self-attention by the distance of positions, shared by all layers (T5, LayoutLMv2)."""
    relative_box: Distances | None = None
    """Bias by the distances of boxes, of their left edges and of their lower ones (LayoutLMv2)."""
    dropout: float = 0.0
    """Dropout after embeddings and sub-layers."""
    attention_dropout: float = 0.0
    """Dropout of attention probabilities."""
    activation_dropout: float = 0.0
    """Dropout of the feed-forward network's hidden values, behind the non-linearity (T5, BART, ViT)."""

    def __post_init__(self) -> None:
        where = f"model.{self.section}"
        require_positive(self, where, "width", "heads", "mlp_width", "eps", "softmax_scale")
        require(self.layers >= self.least_layers, f"{where}.layers must be at least {self.least_layers}, got {self.layers}")
        require(self.layers > 0 or self.relative_position is None, f"{where}.relative_position needs {where}.layers")
        require(
            self.relative_box is None or self.relative_position is not None,
            f"{where}.relative_box needs {where}.relative_position",
        )
        require(
            self.width % self.heads == 0,
            f"{where}.heads must divide {where}.width = {self.width}, got {self.heads}",
        )
        require_share(f"{where}.dropout", self.dropout)
        require_share(f"{where}.attention_dropout", self.attention_dropout)
        require_share(f"{where}.activation_dropout", self.activation_dropout)
