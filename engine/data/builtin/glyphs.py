"""Pictures with names: the glyphs of matplotlib's DejaVu Sans and their Unicode names."""

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageChops, ImageDraw, ImageFont

from engine.data.records.record import DataError

CELL = 32  # side of a glyph's picture in pixels
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_FONT_SIZE = 24
_INVISIBLE = ("Z", "C")  # separators; controls and private use
_EMOJI_FONT = "NotoColorEmoji.ttf"
_EMOJI_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
_EMOJI_SIZE = 109  # the only size the font has
_EMOJI_CANVAS = 136
_FIRST_EMOJI = 0x203C  # below lie digits and signs, which the font has only as parts of sequences


@dataclass(frozen=True)
class Glyph:
    """One picture and its names: letters of several scripts that look the same are one glyph."""

    code_points: tuple[int, ...]
    captions: tuple[str, ...]
    picture: Image.Image

    @property
    def ink(self) -> tuple[int, int, int, int]:
        """Smallest box around everything that is not white."""
        white = Image.new(self.picture.mode, self.picture.size, "white")
        box = ImageChops.difference(self.picture, white).getbbox()
        assert box is not None
        return box


def caption_of(code_point: int) -> str:
    """The lower-case Unicode name, its numbers as words of their own; "" where there is none.

    >>> caption_of(0x170), caption_of(0x2847)
    ('latin capital letter u with double acute', 'braille pattern dots 1 2 3 7')
    """
    name = unicodedata.name(chr(code_point), "").lower()
    kind, _, dots = name.partition(" dots-")
    return f"{kind} dots {' '.join(dots)}" if dots else re.sub(r"-(?=\d)", " ", name)


@lru_cache(maxsize=1)
def glyphs() -> tuple[Glyph, ...]:
    """Every named visible glyph of the font in code point order, equal pictures merged."""
    names: dict[bytes, list[int]] = {}
    pictures: dict[bytes, Image.Image] = {}
    for code_point in sorted(FT2Font(str(FONT)).get_charmap()):
        if not caption_of(code_point) or unicodedata.category(chr(code_point))[0] in _INVISIBLE:
            continue
        picture = _render(chr(code_point))
        if picture.getextrema() == (255, 255):
            continue
        names.setdefault(picture.tobytes(), []).append(code_point)
        pictures.setdefault(picture.tobytes(), picture)
    return tuple(
        Glyph(tuple(code_points), tuple(dict.fromkeys(map(caption_of, code_points))), pictures[pixels])
        for pixels, code_points in names.items()
    )


def _render(character: str) -> Image.Image:
    picture = Image.new("L", (CELL, CELL), 255)
    ImageDraw.Draw(picture).text(
        (CELL / 2, CELL / 2), character, font=_fitting_font(character), fill=0, anchor="mm"
    )
    return picture


def _fitting_font(character: str) -> ImageFont.FreeTypeFont:
    """The usual size, or the largest smaller one in which the character does not leave its cell."""
    for size in range(_FONT_SIZE, 8, -2):
        box = font_of(size).getbbox(character, anchor="mm")
        if max(-box[0], -box[1], box[2], box[3]) <= CELL / 2:
            break
    return font_of(size)


@lru_cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT), size, layout_engine=ImageFont.Layout.BASIC)


def emoji_font() -> Path:
    """The installed Noto colour emoji font."""
    for folder in _EMOJI_FOLDERS:
        for path in sorted(Path(os.path.expanduser(folder)).rglob(_EMOJI_FONT)):
            return path
    raise DataError(
        f'data source "builtin-emoji" needs the font {_EMOJI_FONT}; '
        f"none lies under {', '.join(_EMOJI_FOLDERS)}"
    )


def emoji() -> Iterator[Glyph]:
    """The single-character emoji of the Noto colour font; of equal pictures the first."""
    path = emoji_font()
    font = ImageFont.truetype(str(path), _EMOJI_SIZE, layout_engine=ImageFont.Layout.BASIC)
    seen: set[bytes] = set()
    for code_point in sorted(FT2Font(str(path)).get_charmap()):
        if code_point < _FIRST_EMOJI or not caption_of(code_point):
            continue
        canvas = Image.new("RGB", (_EMOJI_CANVAS, _EMOJI_CANVAS), "white")
        middle = (_EMOJI_CANVAS / 2, _EMOJI_CANVAS / 2)
        ImageDraw.Draw(canvas).text(middle, chr(code_point), font=font, anchor="mm", embedded_color=True)
        picture = canvas.resize((CELL, CELL), Image.Resampling.LANCZOS)
        if picture.tobytes() not in seen and picture.convert("L").getextrema() != (255, 255):
            seen.add(picture.tobytes())
            yield Glyph((code_point,), (caption_of(code_point),), picture)
