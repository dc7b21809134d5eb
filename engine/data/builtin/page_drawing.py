"""Rendered document pages: five kinds of layout, every word with its exact box and line, and tags that say what it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from engine.corruption.pages import GRID
from engine.data.builtin.glyphs import font_of
from engine.data.plan.order import Purpose, generator

WIDTH, HEIGHT = 384, 512
KINDS = ("article", "letter", "list", "form", "table")
TAGS = (*KINDS, "dated", "numbered")
_MARGIN, _GAP = 24, 12
_TEXT, _TITLE = 11, 16  # font sizes
_LONGEST_ITEM = 10  # characters of what stands in a table's first column
_MONTHS = ("January", "March", "April", "June", "August", "October", "November")
_LABELS = ("Name:", "Place:", "Subject:", "Number:", "Reason:", "Owner:", "State:", "Remarks:", "Version:", "Reference:")

PixelBox = tuple[int, int, int, int]


@dataclass
class DrawnPage:
    picture: Image.Image = field(default_factory=lambda: Image.new("L", (WIDTH, HEIGHT), 255))
    words: list[str] = field(default_factory=list)
    pixel_boxes: list[PixelBox] = field(default_factory=list)
    """The ink of each word: right and bottom are exclusive."""
    lines: list[int] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    @property
    def boxes(self) -> np.ndarray:
        """int32 [n, 4]: the same in thousandths of the sides, no ink left out."""
        sides = np.asarray([WIDTH, HEIGHT, WIDTH, HEIGHT])
        scaled = np.asarray(self.pixel_boxes, dtype=np.int64).reshape(-1, 4) * GRID
        return np.where([True, True, False, False], scaled // sides, -(-scaled // sides)).astype(np.int32)

    def write(
        self,
        words: Sequence[str],
        left: int,
        top: int,
        right: int,
        bottom: int,
        size: int = _TEXT,
        goes_on: bool = False,
    ) -> int:
        """Words from left to right and line by line while there is room; the top of the line below.

        `goes_on`: the first line is the last one written, further to the right.
        """
        font, draw = font_of(size), ImageDraw.Draw(self.picture)
        height, space = round(size * 1.3), font.getlength(" ")
        x, y, line = float(left), top, self._next_line() - goes_on
        for word in words:
            length = font.getlength(word)
            if x > left and x + length > right:
                x, y, line = left, y + height, self._next_line()
            if y + height > bottom or left + length > right:
                break
            draw.text((round(x), y), word, font=font, fill=0)
            self.words.append(word)
            self.pixel_boxes.append(tuple(map(round, draw.textbbox((round(x), y), word, font=font))))
            self.lines.append(line)
            x += length + space
        return y + height

    def rule(self, left: int, right: int, y: int) -> None:
        ImageDraw.Draw(self.picture).line((left, y, right, y), fill=128)

    def _next_line(self) -> int:
        return self.lines[-1] + 1 if self.lines else 0


def draw_page(number: int, documents: Sequence[Sequence[str]]) -> DrawnPage:
    """Page `number` with the words of one of the documents, lists of sentences: always the same."""
    random = generator(0, 0, number, Purpose.PAGES)
    sentences = documents[random.integers(len(documents))]
    first = int(random.integers(len(sentences)))
    text = [sentence.split() for sentence in (*sentences[first:], *sentences[:first])]
    page, kind = DrawnPage(), KINDS[random.integers(len(KINDS))]
    page.tags.append(kind)
    top, bottom = _MARGIN, HEIGHT - _MARGIN
    if random.random() < 0.5:
        page.tags.append("dated")
        date = [str(random.integers(1, 29)), _MONTHS[random.integers(len(_MONTHS))], str(random.integers(1970, 2030))]
        top = page.write(date, WIDTH - 150, top, WIDTH - _MARGIN, bottom) + _GAP // 2
    numbered = random.random() < 0.5
    if numbered:
        page.tags.append("numbered")
        bottom -= 2 * _GAP
    _LAYOUTS[kind](page, text, top, bottom, random)
    if numbered:
        page.write(["Page", str(random.integers(1, 500))], WIDTH // 2 - 20, bottom + _GAP, WIDTH - _MARGIN, HEIGHT)
    return page


def _title(page: DrawnPage, text: list[list[str]], top: int) -> int:
    return page.write(text[0][:5], _MARGIN, top, WIDTH - _MARGIN, top + 3 * _TITLE, _TITLE) + _GAP // 2


def _article(page: DrawnPage, text: list[list[str]], top: int, bottom: int, random: np.random.Generator) -> None:
    """A title over two columns."""
    top = _title(page, text, top)
    words = [word for sentence in text[1:] for word in sentence]
    middle = WIDTH // 2
    for left, right in ((_MARGIN, middle - _GAP // 2), (middle + _GAP // 2, WIDTH - _MARGIN)):
        before = len(page.words)
        page.write(words, left, top, right, bottom)
        words = words[len(page.words) - before :]


def _letter(page: DrawnPage, text: list[list[str]], top: int, bottom: int, random: np.random.Generator) -> None:
    """To, from, subject, and paragraphs of two sentences."""
    for label, words in (("To:", text[0][:3]), ("From:", text[0][3:6]), ("Subject:", text[1][:5])):
        top = page.write([label, *words], _MARGIN, top, WIDTH - _MARGIN, bottom)
    for first in range(2, len(text), 2):
        if (top := top + _GAP) > bottom - 3 * _GAP:
            break
        words = [word for sentence in text[first : first + 2] for word in sentence]
        top = page.write(words, _MARGIN, top, WIDTH - _MARGIN, bottom)


def _list(page: DrawnPage, text: list[list[str]], top: int, bottom: int, random: np.random.Generator) -> None:
    """A title over numbered items."""
    top = _title(page, text, top)
    for number, sentence in enumerate(text[1:], 1):
        if top > bottom - 2 * _GAP:
            break
        page.write([f"{number}."], _MARGIN, top, WIDTH, bottom)
        top = page.write(sentence, _MARGIN + 2 * _GAP, top, WIDTH - _MARGIN, bottom, goes_on=True) + 3


def _form(page: DrawnPage, text: list[list[str]], top: int, bottom: int, random: np.random.Generator) -> None:
    """Labels, each with what was filled in on a ruled line."""
    top = _title(page, text, top)
    order = random.permutation(len(_LABELS)).tolist()
    for place, label in enumerate(order):
        words = text[1 + place % (len(text) - 1)][:4]
        page.write([_LABELS[label]], _MARGIN, top, WIDTH, bottom)
        page.write(words, WIDTH // 3, top, WIDTH - _MARGIN, top + 2 * _GAP, goes_on=True)
        page.rule(WIDTH // 3, WIDTH - _MARGIN, top + 2 * _GAP - 6)
        if (top := top + 3 * _GAP) > bottom - 2 * _GAP:
            break


def _table(page: DrawnPage, text: list[list[str]], top: int, bottom: int, random: np.random.Generator) -> None:
    """A head and rows of a word and three numbers."""
    top = _title(page, text, top)
    columns = [_MARGIN + place * (WIDTH - 2 * _MARGIN) // 4 for place in range(5)]
    alone = {word for sentence in text for word in sentence if word.isalpha() and len(word) <= _LONGEST_ITEM}
    words = sorted(alone, key=lambda word: (-len(word), word))
    head = ["Item", *(str(year) for year in random.integers(1970, 2030, size=3))]
    rows = [head, *([word, *map(str, random.integers(0, 10_000, size=3))] for word in words)]
    for row in rows:
        if top > bottom - 2 * _GAP:
            break
        for place, cell in enumerate(row):
            page.write([cell], columns[place], top, columns[place + 1], bottom, goes_on=place > 0)
        top += 18
        page.rule(_MARGIN, WIDTH - _MARGIN, top - 3)


_LAYOUTS = {"article": _article, "letter": _letter, "list": _list, "form": _form, "table": _table}
