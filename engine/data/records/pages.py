"""What the json of a page says: words, boxes, lines, tags, checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.corruption.pages import GRID
from engine.data.records.record import DataError, PageWords, RecordFault

TAGS_FILE = "tags.txt"
_MAX_WORDS = 1 << 16
_MAX_WORD_CHARACTERS = 256
_SAME_LINE = 0.5  # of the lower word's height lies beside the other's


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


def tag_numbers(key: str, tags: Any, names: Sequence[str]) -> tuple[int, ...]:
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise RecordFault(key, "tags must be a list of strings")
    if unknown := [tag for tag in tags if tag not in names]:
        raise RecordFault(key, f"{TAGS_FILE} has no tag {unknown[0]!r}")
    return tuple(sorted({names.index(tag) for tag in tags}))


def tag_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        return tuple(line for line in path.read_text(encoding="utf-8-sig").splitlines() if line)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8") from None
