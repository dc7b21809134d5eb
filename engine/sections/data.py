"""Where records come from, and how captions become ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.sections.checks import require, require_not_negative, require_positive, require_share


@dataclass
class Regions:
    """A detector's regions as the image side of a pair."""

    feature_values: int = 2048
    """Size of a region's feature."""
    classes: int = 1601
    """Classes of the detector's soft labels; class 0 is the background."""
    confidence: float = 0.2
    """Regions of a lower confidence are left out, beyond the first min_count."""
    min_count: int = 10
    """Fewest regions of a picture, where it has as many."""
    max_count: int = 100
    """Most regions of a picture: those of the highest confidence."""

    def __post_init__(self) -> None:
        require_positive(self, "data.regions", "feature_values", "min_count")
        require(self.classes >= 2, f"data.regions.classes must be at least 2, got {self.classes}")
        require(
            self.min_count <= self.max_count,
            f"data.regions.max_count must be at least min_count = {self.min_count}, got {self.max_count}",
        )


@dataclass
class DataSet:
    """One of several sets of training records, and what it trains."""

    source: str | list[str]
    """Its records, written like data.source."""
    tasks: dict[str, float]
    """How often it serves each objective: relative to all tasks of all sets, one is drawn per optimizer step."""

    def __post_init__(self) -> None:
        require(bool(self.source) and bool(self.tasks), "data.sets: a set needs a source and tasks")
        for name, ratio in self.tasks.items():
            require(ratio > 0, f"data.sets: the ratio of {name} must be positive, got {ratio}")


@dataclass
class Texts:
    """Documents that take part in every step beside the pairs of data.source."""

    source: str | list[str] = "builtin-text"
    """Documents, written like data.source."""
    per_step: int = 16
    """How many of train.global_batch are documents."""

    def __post_init__(self) -> None:
        require(bool(self.source), "data.texts.source is empty")
        require_positive(self, "data.texts", "per_step")


@dataclass
class Data:
    """Where records come from and how they become tensors."""

    source: str | list[str] = "builtin"
    """Training records: "builtin" (rendered glyphs and their names), "builtin-scenes" (two to four of them),
    "builtin-emoji" (where the Noto font is installed), "builtin-text" (documents: Python's own help texts),
    "builtin-pages" (such text on rendered pages), "builtin-glyph-classes" (glyphs by script); img2dataset tar shards as
    a path or a brace pattern such as shards/{00000..00099}.tar, documents as .txt or .jsonl files written alike,
    "pages:FOLDER" (pictures beside json of their words and boxes), "classes:FOLDER" (a folder of pictures per class),
    UNITER's databases as "TEXT_DB + IMAGE_DB"; or a list of one sort of these."""
    sets: dict[str, DataSet] | None = None
    """Several named sets in place of data.source, each with its tasks: every optimizer step then trains one
    objective on one set (null: every step trains all objectives on data.source)."""
    texts: Texts | None = None
    """Documents without a picture in every step, in fixed places among the pairs of data.source (SimVLM)."""
    tiny_source: str | None = None
    """What --tiny true trains on in place of the sources (null: the sources themselves)."""
    regions: Regions | None = None
    """Read a detector's regions of each picture in place of its pixels (null: patches)."""
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
    """squash: to the square, whatever the aspect; shorter: the shorter side to image_size, then the centre square (CLIP);
    fit: the shorter side to image_size, the aspect kept (in whole patches, at most model.image.max_grid), so that
    the number of patches varies."""
    max_patches: int | None = None
    """Most patches of a training picture: of a larger one so many are drawn (null: all; ViLT: 200)."""
    random_crop: Literal["none", "resized", "translate"] = "none"
    """Of training images. resized: a random part, resized to the square; translate: moved by up to image_size / 16."""
    random_crop_scale: tuple[float, float] = (0.5, 1.0)
    """Least and largest share of the area that random_crop "resized" keeps."""
    flip: bool = False
    """Mirror training images at random. Leave it off where captions or glyphs say left and right."""
    augment: Literal["none", "rand_augment"] = "none"
    """Of training images, behind the crop. rand_augment: two operations at magnitude 7 that move the picture or change
    its brightness, contrast or sharpness, as ALBEF and BLIP have them; never a mirror."""
    workers: int = 0
    """Loader processes per rank (0: load in the training process). They do not change the order."""
    fault_limit: int = 100
    """Distinct faults in the data (broken records are replaced, and all are named) before the run stops."""
    max_image_pixels: int = 64_000_000
    """Larger images are refused as broken records before they are decoded."""
    max_caption_tokens: int = 64
    """Texts are cut to this many tokens, [CLS] and [SEP] included."""
    fill_captions: bool = False
    """Fill captions with [PAD] up to max_caption_tokens; these are tokens like all others, not padding of a batch
    (SigLIP)."""
    documents: Literal["sentences", "blocks", "next_sentence", "sentence_order"] = "sentences"
    """How documents become examples of max_caption_tokens. sentences: as many in a row of one document as fit; blocks:
    so many tokens in a row, across documents, with [SEP] behind each of them; next_sentence: two segments, the second
    one half the time from another document; sentence_order: two segments, half the time swapped."""
    short_documents: float = 0.0
    """Share of two-segment examples that are cut to a random length (BERT: 0.1)."""
    cache: str = "runs/cache"
    """Folder where the built-in shards and the indices of all shards are kept."""
    permute_captions: bool = False
    """Give every training caption to another image: a control that must learn nothing about held-out pairs."""

    def __post_init__(self) -> None:
        for name in ("source", "held_out", "caption_keys"):
            require(bool(getattr(self, name)), f"data.{name} is empty")
        require_positive(self, "data", "image_size", "max_image_pixels", "max_records", "max_patches")
        require_not_negative(self, "data", "workers", "fault_limit")
        require(min(self.image_std) > 0, f"data.image_std must be positive, got {list(self.image_std)}")
        low, high = self.random_crop_scale
        require(0 < low <= high <= 1, f"data.random_crop_scale must rise within (0, 1], got {[low, high]}")
        require_share("data.short_documents", self.short_documents)
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
    sentinels: int = 0
    """How many ids, the last of a trained vocabulary, stand for the spans that span corruption takes out."""

    def __post_init__(self) -> None:
        require_not_negative(self, "tokenizer", "sentinels")
        least = 16 + self.sentinels
        require(
            self.vocab_size >= least,
            f"tokenizer.vocab_size must be at least 16 and tokenizer.sentinels, {least}, got {self.vocab_size}",
        )
