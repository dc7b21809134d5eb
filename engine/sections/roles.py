"""The roles of a model: streams that a recipe gives it, each with an embedder, a transformer and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from engine.sections.checks import require, require_not_negative, require_positive
from engine.sections.inputs import ImageInput, TextInput
from engine.sections.model import Distances, Stack  # noqa: F401  the parser resolves inherited annotations here

Pooling = Literal["first", "last", "mean", "attention", "pooler"]
Projection = Literal["linear", "affine", "none"]


@dataclass
class ImageStack(ImageInput, Stack):
    """The image tower."""

    section: ClassVar[str] = "image"
    least_layers: ClassVar[int] = 0

    layers: int = 4
    """Number of blocks; 0: what the embedder makes is all there is (a backbone alone: Frozen)."""
    mask: Literal["full", "causal"] = "full"
    """Which token sees which. full: all; causal: none sees a later one."""
    pooling: Pooling = "mean"
    """What stands for the picture. first: its first token; last: its last; mean: of its own tokens, without the class
    token; attention: a learned query's (SigLIP); pooler: a linear map and tanh of the first (BERT)."""
    projection: Projection = "linear"
    """The map from there to the features that are compared. linear: without a bias (CLIP); affine: with one (ALBEF);
    none (SigLIP)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_input("model.image", self.width)
        require(self.positions != "text", "model.image.positions text needs the text beside it, as model.joint has it")
        require(self.codes == 0, "model.image.codes are hidden in the joint stream alone, as model.joint.image has them")
        require(self.type_of_text is None, "model.image.type_of_text needs the text beside it, as model.joint has it")


@dataclass
class TextStack(TextInput, Stack):
    """The text tower."""

    section: ClassVar[str] = "text"

    encoder: Literal["transformer", "gru"] = "transformer"
    """What reads the rows. gru: torch's recurrent network (VSE++), which reads forwards, from embedding_width to width; of
    the other options of a transformer it has layers."""
    layers: int = 2
    """Number of blocks."""
    mask: Literal["full", "causal"] = "full"
    """Which token sees which. full: all (BERT); causal: none sees a later one (GPT, CLIP)."""
    pooling: Pooling = "mean"
    """What stands for the text; as of model.image."""
    projection: Projection = "linear"
    """The map from there to the features that are compared; as of model.image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_input("model.text", self.width)
        attends = self.encoder == "transformer"
        require(
            attends or (self.mask == "full" and self.relative_position is None),
            f"model.{self.section}.mask and relative_position are of attention, and encoder {self.encoder} has none",
        )


@dataclass
class GeneratorStack(TextStack):
    """A second, smaller text stream, whose guesses the text role has to tell from words (ELECTRA)."""

    section: ClassVar[str] = "generator"

    shares: Literal["nothing", "embedder"] = "embedder"
    """What it has in common with the text role, whose tables are then as wide as its own."""


@dataclass
class FusionStack(Stack):
    """The fusion encoder: text that reads the image."""

    section: ClassVar[str] = "fusion"

    layers: int = 2
    """Number of blocks."""
    cross_from: int = 0
    """The first block in which the text attends to the image."""
    cross_every: int = 1
    """Every how many blocks it does so from there on."""
    begins_with: Literal["states", "ids"] = "states"
    """What it goes on with. states: those of the text tower (ALBEF); ids: the text itself, embedded as in the tower,
    whose blocks it shares but for cross-attention (BLIP)."""
    first_token: int | None = None
    """The id that stands in place of a text's first token, counted from the end of the vocabulary where negative (BLIP's
    [ENC]: -1); with ids alone. null: the text's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.first_token is None or self.begins_with == "ids",
            f"model.fusion.first_token needs model.fusion.begins_with ids, got {self.begins_with}",
        )
        require_positive(self, "model.fusion", "cross_every")
        require_not_negative(self, "model.fusion", "cross_from")


@dataclass
class CoAttentionStack:
    """Blocks in which the image tower and the text tower read each other."""

    width: int = 128
    """Of queries, keys and values, whatever the widths of the towers."""
    layers: int = 2
    """How many in either tower: one before each of its last layers (ViLBERT: 6)."""
    heads: int = 4
    """Attention heads; must divide the width."""

    def __post_init__(self) -> None:
        require_positive(self, "model.co_attention", "width", "layers", "heads")
        require(
            self.width % self.heads == 0,
            f"model.co_attention.heads must divide model.co_attention.width = {self.width}, got {self.heads}",
        )


@dataclass
class JointStack(TextInput, Stack):
    """One transformer over learned queries, text and image, in this order, or over some of them."""

    section: ClassVar[str] = "joint"

    queries: int = 0
    """Learned rows before everything else (Q-Former: 32)."""
    text: bool = True
    """Whether the text takes part."""
    image: ImageInput | None = None
    """The embedder of the image; null: it takes no part."""
    kinds: bool = False
    """A learned row for each kind of segment, added behind the norms of the embeddings (ViLT)."""
    mask: Literal["full", "causal", "prefix", "separate"] = "full"
    """Which segment sees which. full: all see all; causal: no token sees a later one; prefix: text sees all else and its
    own past, all else itself alone; separate: every segment itself alone. A loss may ask for another one (BLIP-2)."""
    source: Literal["image"] | None = None
    """The role that queries (or all rows, where there are none) read by cross-attention."""
    cross_from: int = 0
    """The first block in which they do."""
    cross_every: int = 1
    """Every how many blocks they do so from there on (Q-Former: 2)."""
    own_feed_forward: bool = False
    """Queries and text have feed-forward networks of their own (Q-Former)."""
    pooling: Pooling = "pooler"
    """What stands for the sample; as of model.image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_input("model.joint", self.width)
        require_positive(self, "model.joint", "cross_every")
        require_not_negative(self, "model.joint", "queries", "cross_from")
        require(self.text or self.queries > 0 or self.image is not None, "model.joint must have text, image or queries")
        require(
            self.queries > 0 or not self.own_feed_forward,
            "model.joint.own_feed_forward is for queries and text: give model.joint.queries",
        )
        require(self.embedding_width is None, "model.joint.embedding_width must be null: its segments share one width")
        if self.image is not None:
            self._check_image(self.image)

    def _check_image(self, image: ImageInput) -> None:
        image.check_input("model.joint.image", self.width)
        require(
            image.type_of_text is None or image.type_of_text < self.types,
            f"model.joint.image.type_of_text must be a row of model.joint.types = {self.types}, got {image.type_of_text}",
        )


@dataclass
class DecoderStack(TextInput, Stack):
    """A text that is written word by word, from what another role has made."""

    section: ClassVar[str] = "decoder"

    layers: int = 2
    """Number of blocks."""
    source: Literal["image", "text", "fusion", "joint"] | None = None
    """The role whose states it reads; null: none (GPT)."""
    reads: Literal["attention", "prefix"] = "attention"
    """How it reads them. attention: by cross-attention (T5, BART, BLIP); prefix: through a linear map they stand before
    its own text (BLIP-2)."""
    pooled_prefix: int | None = None
    """Of a prefix: so many tokens, which one linear map makes of what stands for the picture (Frozen: 2; null: a token of
    each state)."""
    prefix_mask: Literal["full", "causal"] = "causal"
    """Whether the tokens of a prefix see each other (full) or none sees a later one (causal)."""
    cross_from: int = 0
    """The first block with cross-attention."""
    cross_every: int = 1
    """Every how many blocks have it from there on."""
    first_token: int | None = None
    """The id that stands in place of a text's first token; as of model.fusion (BLIP's [DEC]: -2)."""
    shares: Literal["nothing", "words", "all_but_attention"] = "nothing"
    """What it has in common with the text role. words: their table (T5, BART), which without a text role is that of the
    joint one (SimVLM); all_but_attention: the embedder and the blocks but for self-attention, and with a fusion role its
    cross-attention (BLIP)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_input("model.decoder", self.width)
        require_positive(self, "model.decoder", "cross_every", "pooled_prefix")
        require(
            self.pooled_prefix is None or (self.source, self.reads) == ("image", "prefix"),
            f"model.decoder.pooled_prefix needs source image and reads prefix, got {self.source} and {self.reads}",
        )
        require_not_negative(self, "model.decoder", "cross_from")


@dataclass
class Model:
    """The roles of the model; null leaves one out."""

    image: ImageStack | None = field(default_factory=ImageStack)
    """The image tower."""
    text: TextStack | None = field(default_factory=TextStack)
    """The text tower."""
    fusion: FusionStack | None = field(default_factory=FusionStack)
    """The fusion encoder: goes on with the text and reads the image tower."""
    co_attention: CoAttentionStack | None = None
    """Between the image and the text tower, which then are read together (ViLBERT)."""
    joint: JointStack | None = None
    """One transformer over queries, text and image together."""
    decoder: DecoderStack | None = None
    """A causal transformer over a text that is to be written."""
    generator: GeneratorStack | None = None
    """A second, smaller text stream (ELECTRA)."""
    projection_dim: int = 128
    """Size of the features of the image and the text tower that are compared."""
    logit_scale_init: float | None = 1 / 0.07
    """Initial factor on the cosine similarities, which is learned; null: there is none (VSE++)."""
    logit_scale_min: float = 1e-3
    """The factor never falls below this."""
    logit_scale_max: float = 100.0
    """The factor never grows past this."""
    momentum: float = 0.995
    """What a momentum copy keeps of itself at every step, where an objective learns from one (ALBEF, BLIP)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    initialization: Literal["normal", "depth_scaled", "clip", "xavier", "t5"] = "normal"
    """What else decides the initial weights. normal: nothing (BERT); depth_scaled: those of output maps are divided by the
    square root of twice the layers (GPT-2); clip: those of transformers and projections follow from width and layers, text
    positions have 0.01; xavier: linear maps are uniform within sqrt(6 / (inputs + outputs)) (ViT, MAE); t5: words have 1,
    maps 1 / sqrt(inputs), queries also 1 / sqrt(head width)."""

    def __post_init__(self) -> None:
        require(bool(self.roles), "model: at least one role must be given")
        require_positive(self, "model", "projection_dim", "logit_scale_min")
        require(0 <= self.momentum <= 1, f"model.momentum must be in [0, 1], got {self.momentum}")
        require(
            self.logit_scale_init is None or self.logit_scale_min <= self.logit_scale_init <= self.logit_scale_max,
            f"model.logit_scale_init must be in [logit_scale_min, logit_scale_max] = [{self.logit_scale_min}, "
            f"{self.logit_scale_max}], got {self.logit_scale_init}",
        )
        self._check_what_roles_read()

    @property
    def roles(self) -> list[str]:
        """Names of the roles it has."""
        names = ("image", "text", "fusion", "joint", "decoder", "generator")
        return [name for name in names if getattr(self, name) is not None]

    @property
    def reads_pictures(self) -> ImageInput | None:
        """The embedder that pictures go to: of the image tower, else of the joint stream."""
        return self.image if self.image is not None else self.joint and self.joint.image

    @property
    def reads_text(self) -> bool:
        """Whether any role reads or writes text."""
        towers = (self.text, self.decoder, self.generator)
        return any(role is not None for role in towers) or (self.joint is not None and self.joint.text)

    @property
    def compares_towers(self) -> bool:
        """Whether either tower reads its side of a pair alone, so that features can be compared."""
        return self.image is not None and self.text is not None and self.co_attention is None

    def prefix_tokens(self, words: int, regions: int | None) -> int:
        """The most that stand before the decoder's text, where texts have so many words and pictures so many regions."""
        decoder = self.decoder
        if decoder is None or decoder.source is None or decoder.reads != "prefix":
            return 0
        if decoder.pooled_prefix is not None:
            return decoder.pooled_prefix
        picture = {"image": self.image, "joint": self.joint and self.joint.image}.get(decoder.source)
        cells = 0
        if picture is not None:
            cells = picture.class_tokens + picture.mean_token + (regions or picture.max_grid[0] * picture.max_grid[1])
        if decoder.source == "joint":
            return self.joint.queries + words * self.joint.text + cells
        return cells if decoder.source == "image" else words

    def _check_what_roles_read(self) -> None:
        joins = {name: ("image", "text") for name in ("fusion", "co_attention") if getattr(self, name) is not None}
        needed = {f"model.{name}": roles for name, roles in joins.items()}
        if self.joint is not None and self.joint.source is not None:
            needed["model.joint.source"] = (self.joint.source,)
        if self.decoder is not None:
            needed["model.decoder.source"] = () if self.decoder.source is None else (self.decoder.source,)
            in_joint = self.decoder.shares == "words" and self.text is None and self.joint is not None and self.joint.text
            needed["model.decoder.shares"] = () if self.decoder.shares == "nothing" or in_joint else ("text",)
        if self.generator is not None and self.generator.shares != "nothing":
            needed["model.generator.shares"] = ("text",)
        for name, roles in needed.items():
            missing = [f"model.{role}" for role in roles if getattr(self, role) is None]
            require(not missing, f"{name} needs {' and '.join(missing)}, which is null")
        self._check_blocks_of_text()
        if self.fusion is not None:
            self._check_fusion(self.fusion, self.text)
        if self.co_attention is not None:
            self._check_co_attention(self.co_attention.layers, {"image": self.image, "text": self.text})
        self._check_shared_tables()

    def _check_blocks_of_text(self) -> None:
        needed = {
            "model.co_attention": self.co_attention is not None,
            "model.fusion.begins_with ids": self.fusion is not None and self.fusion.begins_with == "ids",
            "model.decoder.shares all_but_attention": self.decoder is not None and self.decoder.shares == "all_but_attention",
        }
        for name, given in needed.items():
            require(
                not given or self.text.encoder == "transformer",
                f"{name} needs blocks of model.text: model.text.encoder must be transformer, got {given and self.text.encoder}",
            )

    def _check_fusion(self, fusion: FusionStack, text: TextStack) -> None:
        require(
            fusion.width == text.width,
            f"model.fusion.width must be model.text.width = {text.width}, whose stream it goes on with, got {fusion.width}",
        )
        require(
            fusion.begins_with == "states" or fusion.layers == text.layers,
            f"model.fusion.begins_with ids shares the blocks of model.text: model.fusion.layers must be {text.layers}, "
            f"got {fusion.layers}",
        )

    def _check_co_attention(self, layers: int, towers: dict[str, Stack]) -> None:
        require(
            self.fusion is None and self.joint is None,
            "model.co_attention joins the towers itself: model.fusion and model.joint must be null",
        )
        for name, tower in towers.items():
            require(
                layers <= tower.layers,
                f"model.co_attention.layers must not exceed model.{name}.layers = {tower.layers}, got {layers}",
            )
            for option, needed in (("norm", "post"), ("mask", "full")):
                found = getattr(tower, option)
                require(found == needed, f"model.co_attention needs model.{name}.{option} {needed}, got {found}")

    def _check_shared_tables(self) -> None:
        for name, role in (("decoder", self.decoder), ("generator", self.generator)):
            if role is None or role.shares == "nothing":
                continue
            other = "joint" if self.text is None else "text"
            own, theirs = (stack.embedding_width or stack.width for stack in (role, getattr(self, other)))
            require(
                own == theirs,
                f"model.{name}.shares {role.shares} needs tables of one width: those of model.{other} have {theirs}, "
                f"its own {own}",
            )
        if self.decoder is not None and self.decoder.shares == "all_but_attention":
            ours, theirs = (self.decoder.layers, self.decoder.width), (self.text.layers, self.text.width)
            require(
                ours == theirs,
                f"model.decoder.shares all_but_attention needs layers and width of model.text = {theirs}, got {ours}",
            )
