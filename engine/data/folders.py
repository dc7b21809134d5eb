"""Real data as folders: pages with their words, and pictures by class.

pages:FOLDER    NAME.png (or jpg, jpeg, webp) beside NAME.json: {"words": [n strings], "boxes": [n of left, top, right,
                bottom in thousandths of the sides], "lines": [n integers], "tags": [strings]}. Lines may be left out:
                they follow from the boxes. Tags may be left out; tags.txt in the folder names all there are, one a line.
classes:FOLDER  one folder per class with its pictures.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.corruption.pages import GRID
from engine.data.records import (
    MAX_JSON_BYTES,
    DataError,
    FaultLedger,
    PageWords,
    Record,
    RecordFault,
    Texts,
    clean_captions,
    decode_image,
    decode_json,
    image_identity,
)

PAGES, CLASSES = PREFIXES = ("pages:", "classes:")
TAGS_FILE = "tags.txt"
_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp"})
_MAX_IMAGE_BYTES = 1 << 28
_MAX_WORDS = 1 << 16
_MAX_WORD_CHARACTERS = 256
_SAME_LINE = 0.5  # of the lower word's height lies beside the other's


class PageFolder:
    """The pages of a folder by name. Safe in forked and spawned workers."""

    kind = "pages"

    def __init__(
        self, folder: Path, max_image_pixels: int, ledger: FaultLedger, max_records: int | None = None
    ) -> None:
        self.folder, self.max_image_pixels, self.ledger = folder, max_image_pixels, ledger
        pictures = {path.stem: path for path in _pictures(folder)}
        described = {path.stem for path in folder.glob("*.json")}
        for name in sorted(described.symmetric_difference(pictures)):
            ledger.add(f"{folder}/{name}: no {'json' if name in pictures else 'picture'}")
        self._pictures = [pictures[name] for name in sorted(described.intersection(pictures))][:max_records]
        if not self._pictures:
            raise DataError(f"{folder} has no page, a picture beside a json of its name")
        self.class_names = _tag_names(folder / TAGS_FILE)

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Record:
        image, identity = self.picture(index)
        return dataclasses.replace(self.described(index), image=image, identity=identity)

    def described(self, index: int) -> Record:
        """Without touching the picture."""
        key = self._key(index)
        data = _read(key, self._pictures[index].with_suffix(".json"), MAX_JSON_BYTES)
        content = decode_json(key, data)
        words, notes = parse_page(key, content)
        tags = _numbers(key, content.get("tags", []), self.class_names)
        return Record(key, None, [], [], image_identity(data), notes, page=words, classes=tags)

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """(picture, identity) alone."""
        key = self._key(index)
        data = _read(key, self._pictures[index], _MAX_IMAGE_BYTES)
        return decode_image(key, data, self.max_image_pixels), image_identity(data)

    def captions(self, index: int) -> list[str]:
        return [" ".join(self.described(index).page.words)]

    def texts(self, index: int) -> Texts:
        return Texts(self._key(index), self.captions(index))

    def _key(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"page {index} of {len(self)}")
        return f"{self.folder}/{self._pictures[index].stem}"


class ClassFolder:
    """Pictures by the folder they lie in. `class_names`: those of the training pictures, where these are others."""

    def __init__(
        self,
        folder: Path,
        max_image_pixels: int,
        ledger: FaultLedger,
        max_records: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.folder, self.max_image_pixels, self.ledger = folder, max_image_pixels, ledger
        own = class_names_of(folder)
        self.class_names = tuple(own if class_names is None else class_names)
        if unknown := sorted(set(own).difference(self.class_names)):
            raise DataError(f"{folder} has the class {unknown[0]!r}, which the training pictures have not")
        found = [(path, number) for number, name in enumerate(self.class_names) for path in _pictures(folder / name)]
        if max_records is not None and max_records < len(found):
            found = [found[place] for place in np.linspace(0, len(found) - 1, max_records).astype(int).tolist()]
        self._pictures = found
        if not found:
            raise DataError(f"{folder} has no picture in a folder of its class")

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Record:
        texts = self.texts(index)
        path, number = self._pictures[index]
        data = _read(texts.key, path, _MAX_IMAGE_BYTES)
        image = decode_image(texts.key, data, self.max_image_pixels)
        return Record(texts.key, image, texts.captions, [], image_identity(data), classes=(number,))

    def captions(self, index: int) -> list[str]:
        return self.texts(index).captions

    def texts(self, index: int) -> Texts:
        """The name of its class, in words."""
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        path, number = self._pictures[index]
        key = f"{self.folder}/{self.class_names[number]}/{path.name}"
        captions, notes = clean_captions(key, self.class_names[number].replace("_", " "))
        return Texts(key, captions, notes=notes)


def class_names_of(folder: Path) -> list[str]:
    """The classes of a folder of folders, in order of their names."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not names:
        raise DataError(f"{folder} has no folders, one for each class")
    return names


def parse_page(key: str, content: dict[str, Any]) -> tuple[PageWords, tuple[str, ...]]:
    """(words, notes) of a page's json; words without a visible character are left out."""
    words, boxes = content.get("words"), content.get("boxes")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise RecordFault(key, "words must be a list of strings")
    if len(words) > _MAX_WORDS:
        raise RecordFault(key, f"{len(words)} words, the limit is {_MAX_WORDS}")
    corners = _integers(key, "boxes", boxes, len(words), 4, GRID)
    if not (corners[:, :2] <= corners[:, 2:]).all():
        raise RecordFault(key, "boxes must be left, top, right, bottom: none may end before it begins")
    lines = content.get("lines")
    rows = lines_of(corners) if lines is None else _integers(key, "lines", lines, len(words), None, _MAX_WORDS)
    folded = ["".join(word.split()) for word in words]
    try:
        "".join(folded).encode()
    except UnicodeEncodeError:  # json can spell surrogates; no tokenizer takes them
        raise RecordFault(key, "words are not valid Unicode") from None
    seen = np.asarray([bool(word) for word in folded], dtype=bool)
    if not seen.any():
        raise RecordFault(key, "page has no words")
    notes = [f"{(~seen).sum()} of {len(words)} words are empty"] if not seen.all() else []
    if overlong := sum(len(word) > _MAX_WORD_CHARACTERS for word in folded):
        notes.append(f"{overlong} words cut to their first {_MAX_WORD_CHARACTERS} characters")
    kept = [word[:_MAX_WORD_CHARACTERS] for word in folded if word]
    return PageWords(kept, corners[seen], np.unique(rows[seen], return_inverse=True)[1].astype(np.int32)), tuple(notes)


def lines_of(boxes: np.ndarray) -> np.ndarray:
    """int32 [n]: words in reading order go on with the line while they stand to the right and at the same height."""
    lines = np.zeros(len(boxes), dtype=np.int32)
    for place in range(1, len(boxes)):
        (left, top, _, bottom), (before, above, _, below) = boxes[place].tolist(), boxes[place - 1].tolist()
        shared = min(bottom, below) - max(top, above)
        same = left >= before and shared > _SAME_LINE * min(bottom - top, below - above)
        lines[place] = lines[place - 1] + (not same)
    return lines


def _integers(key: str, name: str, value: Any, count: int, width: int | None, limit: int) -> np.ndarray:
    """int32 [count] or [count, width] of a list, or a list of lists, from 0 to `limit`."""
    rows = value if isinstance(value, list) else []
    flat = rows if width is None else [one for row in rows if _is_row(row, width) for one in row]
    if (
        len(rows) != count
        or len(flat) != count * (width or 1)
        or not all(type(one) is int and 0 <= one <= limit for one in flat)
    ):
        each = "" if width is None else f" lists of {width}"
        raise RecordFault(key, f"{name} must be {count}{each} integers from 0 to {limit}, as many as words")
    return np.asarray(flat, dtype=np.int32).reshape(count if width is None else (count, width))


def _is_row(row: Any, width: int) -> bool:
    return isinstance(row, list) and len(row) == width


def _numbers(key: str, tags: Any, names: Sequence[str]) -> tuple[int, ...]:
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise RecordFault(key, "tags must be a list of strings")
    if unknown := [tag for tag in tags if tag not in names]:
        raise RecordFault(key, f"{TAGS_FILE} has no tag {unknown[0]!r}")
    return tuple(sorted({names.index(tag) for tag in tags}))


def _tag_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        return tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8") from None


def _pictures(folder: Path) -> list[Path]:
    """Nothing where there is no such folder: a class may have no picture in a split."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _EXTENSIONS and path.is_file())


def _read(key: str, path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise RecordFault(key, f"{path.name} cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise RecordFault(key, f"{path.name} has more than {limit} bytes")
    return data
