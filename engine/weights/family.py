"""A family of published models: which roles its weights can fill, what has to agree, and what everything is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from engine.weights.pieces import Piece, beneath
from engine.weights.sizes import Sizes

WORD_HEADS = ("heads.masked_language", "heads.distillation.words", "heads.replaced_tokens.words", "heads.causal_language")
"""Heads of words that are BERT's: a transform, and the word table with a bias."""


class Place(NamedTuple):
    """A role of ours that is filled or written."""

    role: str
    stack: Any
    """Its section."""
    first: int = 0
    """Which of their layers its first one is."""

    @property
    def layers(self) -> int:
        return self.stack.layers

    @property
    def words(self) -> str:
        """The embedder of its text."""
        return "joint.text" if self.role == "joint" else f"{self.role}.embedder"

    @property
    def transformer(self) -> str:
        return f"{self.role}.transformer"

    @property
    def pooling(self) -> str:
        return f"{self.role}.pooling"

    def beneath(self, theirs: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Pieces of an image tower as this role's; in a joint stream those of its picture and of its transformer."""
        for piece in beneath(self.role, theirs, pieces):
            yield piece._replace(ours=piece.ours.replace("joint.embedder.", "joint.image.", 1))


class Processor(NamedTuple):
    """What prepares the pictures of a folder."""

    name: str
    """A class of `transformers`."""
    fits: bool = False
    """Whether it keeps the aspect of a picture, as data.resize fit does; else it gives squares."""
    entries: Mapping[str, Any] = {}
    """Others than follow from a run's transform."""


class Part(NamedTuple):
    """What of a folder fills one role."""

    roles: tuple[str, ...]
    """Ours that it can fill; the first that a run has is its own where a whole folder is read."""
    sizes: Sizes
    pieces: Callable[[Place], Iterator[Piece]]
    section: str | None = None
    """Of config.json; null: its top."""

    def settings(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return config if self.section is None else config.get(self.section) or {}


def no_pieces(model: Any) -> Iterator[Piece]:
    return iter(())


def normalization_of_processor(folder: Any) -> tuple[Any, Any]:
    """As its preprocessor_config.json tells it."""
    return folder.processor.get("image_mean"), folder.processor.get("image_std")


@dataclass(frozen=True)
class Family:
    """Folders of one kind."""

    name: str
    kind: str
    """The model_type of config.json."""
    classes: Mapping[str, tuple[str, ...]]
    """Heads that a class of `transformers` needs; the first is taken whose heads are all there."""
    parts: tuple[Part, ...]
    heads: Callable[[Any], Iterator[Piece]] = no_pieces
    """What of a model belongs to no role: read with the role that words are predicted from, or with the whole."""
    prefix: str = ""
    """Before the names of all that is not a head, but in folders of the bare model."""
    spellings: tuple[tuple[str, str], ...] = ()
    """How files spell what we name as the classes of `transformers` do today."""
    older: tuple[tuple[str, str], ...] = ()
    """How some files spell what others spell as told."""
    sizes: Sizes = Sizes({})
    """Of `model` itself."""
    settings: Callable[[Any], dict[str, Any]] = lambda model: {}
    """Other entries of the config.json of a model, by section where it has them."""
    agreeing: tuple[str, ...] = ()
    """Of these, what must agree where a folder fills heads."""
    swapped: Callable[[Any], tuple[int, int]] | None = None
    """Ids of a tokenizer that have to change places, where the family reads one of them otherwise than we do."""
    borders: Literal["both", "end", "none"] = "both"
    """What stands around a text that is read: [CLS] and [SEP], [SEP] behind it, nothing."""
    processor: Processor | None = None
    prepared: Callable[[Any], dict[str, Any]] = lambda transform: {}
    """Entries of config.json, by section, that follow from a run's transform of pictures."""
    normalization: Callable[[Any], tuple[Any, Any]] = normalization_of_processor
    """Of a folder: mean and deviation of its pictures' channels, red first; null where it does not say."""
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    """Classes of `transformers` that give more than ids, by the kind of a tokenizer's pieces; else a plain one does."""
    reads_padding: bool = False
    """Whether [PAD] is a token as any other, so that nothing tells which are."""
    is_written: bool = True
    """Whether a model can become such a folder."""
