"""The built-in sets that are no shards: documents, pages, classes of glyphs. Written once, always the same bytes."""

import hashlib
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

from PIL import Image, features

from engine.data.builtin import glyphs, page_drawing, picture_sets, prose
from engine.data.builtin.glyphs import Glyph
from engine.data.records.cache_folder import write_folder
from engine.data.records.pages import TAGS_FILE

TEXT, PAGES, GLYPH_CLASSES = NAMES = ("builtin-text", "builtin-pages", "builtin-glyph-classes")
NUM_PAGES = {"train": 1024, "held_out": 128}
_FORMAT = "1"
_LEAST_GLYPHS = 40  # of a class in training
_DOCUMENTS = "documents.jsonl"


def folder(name: str, split: str, cache: Path) -> Path:
    """The folder of a built-in set, written first where the cache lacks it."""
    found = cache / f"{name}-{split}-{_fingerprint(name)}"
    if not found.is_dir():
        write_folder(found, partial(_WRITERS[name], split))
    return found


def documents_file(split: str, cache: Path) -> Path:
    return folder(TEXT, split, cache) / _DOCUMENTS


def _fingerprint(name: str) -> str:
    """Of all that the set depends on: another Python, font or renderer gets a folder of its own."""
    parts = [_FORMAT, *(() if name == GLYPH_CLASSES else (prose.fingerprint(),))]
    if name != TEXT:
        parts += [glyphs.FONT.read_bytes().hex(), Image.__version__]
        parts += [str(features.version(part)) for part in ("freetype2", "zlib")]
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=6).hexdigest()


def _write_text(split: str, folder: Path) -> None:
    lines = [
        json.dumps({"name": one.name, "sentences": one.sentences})
        for one in prose.documents()
        if one.held_out == (split == "held_out")
    ]
    (folder / _DOCUMENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_pages(split: str, folder: Path) -> None:
    """Held-out pages have the words of held-out documents."""
    documents = [one.sentences for one in prose.documents() if one.held_out == (split == "held_out")]
    first = 0 if split == "train" else NUM_PAGES["train"]
    for number in range(first, first + NUM_PAGES[split]):
        page = page_drawing.draw_page(number, documents)
        content = {"words": page.words, "boxes": page.boxes.tolist(), "lines": page.lines, "tags": page.tags}
        page.picture.save(folder / f"{number:06d}.png")
        (folder / f"{number:06d}.json").write_text(json.dumps(content))
    (folder / TAGS_FILE).write_text("".join(f"{tag}\n" for tag in page_drawing.TAGS))


def _write_classes(split: str, folder: Path) -> None:
    """Glyphs of one name by the first word of it; words that few training glyphs begin with are left out."""
    counts = Counter(family(glyph) for glyph in picture_sets.split_glyphs("train"))
    for glyph in picture_sets.split_glyphs(split):
        if (name := family(glyph)) is not None and counts[name] >= _LEAST_GLYPHS:
            (folder / name).mkdir(exist_ok=True)
            glyph.picture.save(folder / name / f"{glyph.code_points[0]:05x}.png")


def family(glyph: Glyph) -> str | None:
    """The script or kind its name begins with; None where it has several names that disagree."""
    words = {re.split(r"[ -]", caption)[0] for caption in glyph.captions}
    return words.pop() if len(words) == 1 else None


_WRITERS = {TEXT: _write_text, PAGES: _write_pages, GLYPH_CLASSES: _write_classes}
