"""Records, and what becomes of broken ones: every fault is named and counted, nothing is executed."""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from engine.data.tokenization.tokenizer import Tokenizer

MAX_CAPTION_CHARACTERS = 8_192  # a caption is cut here, before any tokenizer sees it
MAX_JSON_BYTES = 1 << 24
_SURROGATE = re.compile("[\ud800-\udfff]")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # naming them keeps Pillow's PostScript and other interpreters out


class DataError(ValueError):
    """One clear line that stops a run."""


class MissingData(DataError):
    """Files or folders are not there."""


class RecordFault(Exception):
    """A record that cannot be used: its name and the reason."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)  # both, so that it survives pickling between processes
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True)
class Region:
    """A captioned box (left, top, right, bottom) of a picture in pixels, right and bottom exclusive."""

    box: tuple[int, int, int, int]
    caption: str
    kind: int | None = None
    """The class of what it shows, by number, where a set tells classes apart."""
    attribute: int | None = None
    """Something else that is true of it, by number, where a set knows it."""


@dataclass(frozen=True)
class Detections:
    """A detector's regions of one picture, checked."""

    features: np.ndarray
    """float32 [n, F]."""
    boxes: np.ndarray
    """float32 [n, 7]: x1, y1, x2, y2, w, h as shares of the picture's sides, and w * h."""
    soft_labels: np.ndarray | None
    """float32 [n, C]: the detector's distribution over its classes, where it is known and was asked for."""


@dataclass(frozen=True)
class Texts:
    """What is said about a picture: captions, or in their place their ids without [CLS] and [SEP]."""

    key: str
    captions: list[str]
    token_ids: list[list[int]] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.captions if self.token_ids is None else self.token_ids)


@dataclass(frozen=True)
class PageWords:
    """The words of a page in reading order, checked."""

    words: list[str]
    boxes: np.ndarray
    """int32 [n, 4]: left, top, right, bottom in thousandths of the page's sides."""
    lines: np.ndarray
    """int32 [n]: the line of each word."""


@dataclass(frozen=True)
class Record:
    """A picture with its captions; `identity` is equal for equal image files, `notes` names mended faults.

    A run that reads regions has `detections` in place of `image`; a set of ids has `token_ids` in place of
    captions. A document has sentences and no picture, a page has words and a picture, a picture of a class may have
    no caption.
    """

    key: str
    image: Image.Image | None
    captions: list[str]
    regions: list[Region]
    identity: int
    notes: tuple[str, ...] = ()
    detections: Detections | None = None
    token_ids: list[list[int]] | None = None
    sentences: list[str] | None = None
    page: PageWords | None = None
    classes: tuple[int, ...] = ()
    """What it shows, by number in the source's `class_names`: one class of a picture, any number of tags of a page."""


@dataclass(frozen=True)
class ExampleIndex:
    """The examples of a source that reads regions, and how long they are: one per caption of a record."""

    records: np.ndarray
    """int32 [E]: record of each example."""
    captions: np.ndarray
    """int32 [E]: which of its captions."""
    tokens: np.ndarray
    """int32 [E]: tokens of the caption, [CLS] and [SEP] included, as it will be read."""
    images: np.ndarray
    """int32 [E]: picture of the record."""
    regions: np.ndarray
    """int32 [num_images]: regions of each picture; 0 where no example needs it or it cannot be read."""


class FaultLedger:
    """Every distinct fault by name; more than `limit` of them stop the run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.faults: list[str] = []

    def add(self, fault: RecordFault | str) -> None:
        """Counts a fault, "name: reason", unless it is known."""
        if str(fault) in self.faults:
            return
        self.faults.append(str(fault))
        if len(self.faults) > self.limit:
            raise DataError(
                f"{len(self.faults)} broken records, more than data.fault_limit = {self.limit}; "
                f"the last is {fault}"
            )

    def summary(self) -> str:
        """One line: how many, and the first of them."""
        return f"{len(self.faults)} broken records" + (f", the first is {self.faults[0]}" if self.faults else "")


class Source(Protocol):
    """A map-style set of records. Reading one raises RecordFault where it is broken.

    Pictures have numbers of their own, because several records may share one. All below `texts` is for runs
    that read regions.
    """

    ledger: FaultLedger

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def captions(self, index: int) -> list[str]:
        """The captions alone, without touching the picture."""

    def texts(self, index: int) -> Texts:
        """What the record says, without touching the picture."""

    @property
    def num_images(self) -> int: ...

    def image_of(self, index: int) -> int:
        """The picture of a record."""

    def identity(self, image: int) -> int:
        """Equal for equal pictures; told without reading their regions."""

    def detections(self, image: int, soft_labels: bool = True) -> tuple[int, Detections]:
        """(identity, regions) of a picture; without soft labels it is faster."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer other than the one the source's ids were made with."""

    def index(self, tokenizer: Tokenizer, max_tokens: int) -> ExampleIndex:
        """All examples that can be read; the ledger names what cannot. Kept on disk where it is slow.

        Refuses what `check_tokenizer` refuses.
        """


def image_identity(data: bytes) -> int:
    """63 bits of the file's digest."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def decode_image(key: str, data: bytes, max_pixels: int) -> Image.Image:
    """RGB image, transparency over white. The size is checked in the header, before any pixel is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise RecordFault(key, f"image of {width} x {height} pixels, the limit is {max_pixels}")
        return _over_white(image)
    except RecordFault:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, also checked in the header
        raise RecordFault(key, f"{error} (the limit is {max_pixels})") from None
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise RecordFault(key, f"image cannot be decoded ({type(error).__name__}: {error})") from None


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_text(key: str, data: bytes, complete: bool) -> str:
    """UTF-8 text, with or without a byte order mark; an incomplete one may end inside a character."""
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=complete)
    except UnicodeDecodeError:
        raise RecordFault(key, "caption is not UTF-8") from None


def decode_json(key: str, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordFault(key, f"json cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise RecordFault(key, f"json must be an object, got {type(content).__name__}")
    return content


def clean_captions(key: str, value: Any) -> tuple[list[str], tuple[str, ...]]:
    """(captions, notes) of a string or a list: white space folded, overlong ones cut, empty ones dropped."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise RecordFault(key, "caption must be a string or a list of strings")
    notes = [
        f"caption cut to its first {MAX_CAPTION_CHARACTERS} characters"
        for text in texts
        if len(text) > MAX_CAPTION_CHARACTERS
    ]
    captions = [" ".join(text[:MAX_CAPTION_CHARACTERS].split()) for text in texts]
    if not any(captions):
        raise RecordFault(key, "caption is empty")
    if not all(captions):
        notes.append(f"{captions.count('')} of {len(captions)} captions are empty")
    if any(map(_SURROGATE.search, captions)):  # json can spell them; no tokenizer takes them
        raise RecordFault(key, "caption is not valid Unicode")
    return [caption for caption in captions if caption], tuple(notes)


def parse_regions(key: str, value: Any) -> list[Region]:
    """Regions of the json's "regions": a list of {"box": [left, top, right, bottom], "caption": text}, which may have a
    "class" and an "attribute" besides."""
    try:
        return [_region(item) for item in value]
    except (AttributeError, TypeError, KeyError, ValueError):
        wanted = 'regions must be a list of {"box": [4 integers], "caption": text}, with numbers from 0 as "class" and "attribute"'
        raise RecordFault(key, wanted) from None


def _region(item: dict[str, Any]) -> Region:
    numbers = [None if (number := item.get(name)) is None else int(number) for name in ("class", "attribute")]
    if any(number is not None and number < 0 for number in numbers):
        raise ValueError
    return Region(_box(item["box"]), str(item["caption"]), *numbers)


def _box(values: Sequence[int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = (int(value) for value in values)
    return left, top, right, bottom
