"""Real data as folders: pages with their words, and pictures by class.

pages:FOLDER    NAME.png (or jpg, jpeg, webp) beside NAME.json: {"words": [n strings], "boxes": [n of left, top, right,
                bottom in thousandths of the sides], "lines": [n integers], "tags": [strings]}. Lines may be left out:
                they follow from the boxes. Tags may be left out; tags.txt in the folder names all there are, one a line.
classes:FOLDER  one folder per class with its pictures.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from engine.data.records.pages import TAGS_FILE, parse_page, tag_names, tag_numbers
from engine.data.records.record import (
    MAX_JSON_BYTES,
    DataError,
    FaultLedger,
    Record,
    RecordFault,
    Texts,
    clean_captions,
    decode_image,
    decode_json,
    image_identity,
)

PAGES, CLASSES = PREFIXES = ("pages:", "classes:")
_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp"})
_MAX_IMAGE_BYTES = 1 << 28


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
        self.class_names = tag_names(folder / TAGS_FILE)

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
        tags = tag_numbers(key, content.get("tags", []), self.class_names)
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
