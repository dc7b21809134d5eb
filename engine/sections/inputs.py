"""How ids, pictures and regions become rows of a stream: what embedders are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.sections.checks import require, require_not_negative, require_positive


@dataclass
class TextInput:
    """The embedder of a text."""

    max_positions: int = 64
    """The longest text in tokens; rows of the position table."""
    positions: Literal["learned", "sinusoidal", "none"] = "learned"
    """The table of positions; none: what attends tells them apart (T5's bias)."""
    position_offset: int = 0
    """Rows of the position table before the first token's (RoBERTa and BART leave 2)."""
    types: int = 0
    """Rows of the table of token types (BERT's two sentences); 0: no table."""
    embedding_norm: bool = True
    """A LayerNorm behind the sum of embeddings (BERT); false: none (GPT, CLIP, T5)."""
    embedding_width: int | None = None
    """Width of the tables where it is not that of the stream: a linear map follows (ALBERT, ELECTRA)."""
    page: Literal["sum", "concat"] | None = None
    """Tables of where each word lies on its page. sum: six rows added to the word's (LayoutLM); concat: six rows side
    by side (LayoutLMv2); null: none."""

    def check_input(self, where: str, width: int) -> None:
        """Refuse what does not fit a stream of this width."""
        require_positive(self, where, "max_positions", "embedding_width")
        require_not_negative(self, where, "position_offset", "types")
        own = self.embedding_width or width
        require(
            self.page != "concat" or own % 2 == 0,
            f"{where}.page concat has equal rows for heights and widths: the width must be even, got {own}",
        )
        require(
            self.positions != "sinusoidal" or own % 2 == 0,
            f"{where}.positions sinusoidal has a sine and a cosine per frequency: the width must be even, got {own}",
        )


@dataclass
class ImageInput:
    """The embedder of a picture."""

    kind: Literal["patches", "regions", "grid"] = "patches"
    """patches: a linear map of squares of pixels; regions: a detector's features and boxes (data.regions says which);
    grid: the cells of a convolutional backbone."""
    patch_size: int = 8
    """Side of a square patch in pixels."""
    max_grid: tuple[int, int] = (4, 4)
    """Rows and columns of the largest grid of patches; of a backbone, those its last map is pooled to."""
    patch_bias: bool = True
    """A bias in the linear map of patches (CLIP has none)."""
    positions: Literal["factored", "learned", "sinusoidal", "text", "none"] = "factored"
    """Tables of the place in the grid. factored: one for rows and one for columns; learned: one row per place;
    sinusoidal: not learned (MAE); text: the text's own tables of positions and boxes (LayoutLMv2); none: none. Regions
    have their boxes instead."""
    class_token: bool = False
    """A learned token before the picture's own."""
    distillation_token: bool = False
    """Another one behind it (DeiT)."""
    mean_token: bool = False
    """A token before the regions: their mean, in the box of the whole picture (ViLBERT)."""
    embedding_norm: bool = True
    """A LayerNorm behind the sum of embeddings (UNITER, CLIP); false: none (ViT, SigLIP)."""
    type_of_text: int | None = None
    """Row of the text's table of token types that every token of the picture has too (UNITER: 1)."""
    box_values: Literal[5, 7] = 7
    """Numbers of a region's box. 7: corners, sides, area, with a norm for features and one for boxes (UNITER); 5:
    corners and area, added as they are (ViLBERT), to 0 where a region is hidden."""
    backbone: Literal["resnet18", "resnet50", "resnet101", "resnet152", "resnet18_fpn", "resnext101_fpn"] = "resnet50"
    """Of a grid. fpn: the finest level of a feature pyramid; resnext101_fpn: over a ResNeXt-101 32x8d (LayoutLMv2)."""
    grid_pooling: Literal["mean", "max"] = "mean"
    """How the backbone's last map becomes the grid (SOHO: max)."""
    codes: int = 0
    """Codes of a visual dictionary, which every cell of a grid is mixed with (SOHO: 2048); 0: none."""
    stages: int | None = None
    """How many of the backbone's four stages there are (null: all; SimVLM: 3, at a sixteenth of the resolution)."""
    unit_cells: bool = False
    """The cells of a backbone have length 1 before their linear map (VSE++)."""
    backbone_norm: Literal["frozen", "batch"] = "frozen"
    """Behind the backbone's convolutions. frozen: a map that stands still, for weights of a network that was trained with
    another; batch: by the pictures of a micro-step on all ranks, which lets it begin from nothing."""

    @property
    def cell_side(self) -> int:
        """Side in pixels of what a place of the backbone's last map is of."""
        return 4 if self.backbone.endswith("_fpn") else 2 ** (1 + (self.stages or 4))

    @property
    def class_tokens(self) -> int:
        """How many learned tokens stand before the picture's own."""
        return self.class_token + self.distillation_token

    def check_input(self, where: str, width: int) -> None:
        """Refuse what does not fit a stream of this width."""
        require_positive(self, where, "patch_size")
        require_not_negative(self, where, "codes")
        require(
            self.codes == 0 or self.kind == "grid",
            f"{where}.codes are chosen by the cells of a backbone: {where}.kind must be grid, got {self.kind}",
        )
        require(
            self.stages is None or (1 <= self.stages <= 4 and not self.backbone.endswith("_fpn")),
            f"{where}.stages must be 1 to 4 of a backbone without a pyramid, got {self.stages} of {self.backbone}",
        )
        require(min(self.max_grid) > 0, f"{where}.max_grid must be positive, got {list(self.max_grid)}")
        require(
            self.positions != "sinusoidal" or width % 4 == 0,
            f"{where}.positions sinusoidal splits a row in four: the width must be a multiple of 4, got {width}",
        )
        require(
            not self.mean_token or (self.kind == "regions" and not self.class_token),
            f"{where}.mean_token stands before regions, and no class_token beside it: {where}.kind must be regions, got "
            f"{self.kind} with class_token {str(self.class_token).lower()}",
        )
        require(
            self.class_token or not self.distillation_token,
            f"{where}.distillation_token stands behind a class token: {where}.class_token must be true, got false",
        )
        require(
            not self.class_token or self.positions in ("learned", "sinusoidal", "none"),
            f"{where}.class_token has a row of its own in a table of places: positions must be learned, sinusoidal or "
            f"none, got {self.positions}",
        )
