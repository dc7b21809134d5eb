"""What LayoutLMv2 spoils on a page: words and lines blanked in its picture, other pictures, no picture."""

from enum import IntEnum

import numpy as np

GRID = 1000  # boxes are left, top, right, bottom in thousandths of the page's sides


class Picture(IntEnum):
    """What is shown beside a page's words."""

    OWN = 0
    ANOTHER = 1
    NONE = 2


def draw_picture(random: np.random.Generator, another: float = 0.15, none: float = 0.05) -> Picture:
    """Text-image matching: the page's own picture, another page's, or none."""
    draw = random.random()
    return Picture.ANOTHER if draw < another else Picture.NONE if draw < another + none else Picture.OWN


def cover_lines(lines: np.ndarray, probability: float, random: np.random.Generator) -> np.ndarray:
    """bool like `lines`, the line of each token (specials -1): each line is covered with the probability."""
    distinct, members = np.unique(lines, return_inverse=True)
    covered = (random.random(distinct.size) < probability) & (distinct >= 0)
    return covered[members]


def boxes_of_lines(boxes: np.ndarray, lines: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """int32 [n, 4]: around the tokens of every line of which `chosen` says so."""
    members = [boxes[lines == line] for line in np.unique(lines[chosen])]
    around = [(*own[:, :2].min(0), *own[:, 2:].max(0)) for own in members]
    return np.asarray(around, dtype=np.int32).reshape(-1, 4)


def alignment_labels(
    lines: np.ndarray, covered: np.ndarray, masked: np.ndarray, own_picture: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(positions, labels) of text-image alignment: 1 where the token's line is covered in the picture it is shown with.

    Special tokens and `masked` positions, which masked language modelling selected, are left out. Beside any picture
    but its own, or none, nothing of the text is to be seen: all are covered.
    """
    asked = lines >= 0
    asked[masked] = False
    positions = np.flatnonzero(asked)
    labels = covered[positions] | (not own_picture)
    return positions, labels.astype(np.int64)


def blank(pixels: np.ndarray, boxes: np.ndarray, fill: float = 0) -> np.ndarray:
    """A picture [H, W, ...] with everything inside the boxes [n, 4] filled; a pixel that a box touches is inside.

    Of normalised pixels 0 is the mean colour; the paper does not say which one it uses.
    """
    height, width = pixels.shape[:2]
    sides = np.asarray([width, height, width, height])
    shares = boxes.astype(np.int64) * sides
    corners = np.where([True, True, False, False], shares // GRID, -(-shares // GRID))
    blanked = pixels.copy()
    for left, top, right, bottom in corners.tolist():
        blanked[top:bottom, left:right] = fill
    return blanked
