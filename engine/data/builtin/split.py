"""How the held-out glyphs were chosen: unseen combinations of seen words.

`python -m engine.data.builtin.split` prints the code points that `held_out.py` keeps. They are kept, not recomputed,
so that the split stays the same whatever versions of the font renderer and of Unicode's tables a machine has.
"""

import hashlib
import re
import textwrap
from collections import Counter

import numpy as np

from engine.data.builtin.glyphs import Glyph, glyphs

GALLERY = 800
MIN_WORDS = 3  # of a held-out caption
MIN_TRAINING_CAPTIONS = 3  # that hold each of its words
NEAR_IDENTICAL = 0.03  # share of the ink in which two pictures differ, at the best shift by one pixel


def words(caption: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+", caption)


def ink_differences(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[N, M]: squared difference over the larger squared ink, at the best shift by at most one pixel."""
    others = others.reshape(len(others), -1)
    best = np.full((len(pictures), len(others)), np.inf, dtype=np.float32)
    norms = (others**2).sum(1)
    for shift in np.ndindex(3, 3):
        moved = np.roll(pictures, (shift[0] - 1, shift[1] - 1), axis=(1, 2)).reshape(len(pictures), -1)
        squares = (moved**2).sum(1)[:, None]
        difference = (squares + norms - 2 * moved @ others.T) / np.maximum(squares, norms)
        np.minimum(best, difference, out=best)
    return best


def ink(glyph: Glyph) -> np.ndarray:
    return 1 - np.asarray(glyph.picture, dtype=np.float32) / 255


def choose_held_out(candidates: tuple[Glyph, ...]) -> list[int]:
    """Glyphs with one name, in hash order, as long as every word stays often enough in training."""
    counts = Counter(
        word for glyph in candidates for caption in glyph.captions for word in set(words(caption))
    )
    pictures = np.stack([ink(glyph) for glyph in candidates])
    distinct = (ink_differences(pictures, pictures) < NEAR_IDENTICAL).sum(1) == 1
    chosen: list[int] = []
    for number in sorted(range(len(candidates)), key=lambda number: _draw(candidates[number])):
        glyph = candidates[number]
        named = words(glyph.captions[0])
        if (
            len(chosen) == GALLERY
            or len(glyph.captions) > 1
            or len(set(named)) < MIN_WORDS
            or not distinct[number]
        ):
            continue
        if all(counts[word] > MIN_TRAINING_CAPTIONS for word in named):
            chosen.append(glyph.code_points[0])
            counts.subtract(set(named))
    return sorted(chosen)


def _draw(glyph: Glyph) -> bytes:
    return hashlib.blake2b(glyph.code_points[0].to_bytes(4, "little"), digest_size=8).digest()


if __name__ == "__main__":
    print(textwrap.fill(" ".join(f"{code_point:x}" for code_point in choose_held_out(glyphs())), width=108))
