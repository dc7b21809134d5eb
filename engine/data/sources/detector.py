"""The built-in detector: what a Faster R-CNN is to photographs, for scenes of known glyphs.

It proposes boxes around the glyphs, whose places the set knows, and around parts and groups of them; of a box
it sees 16 x 16 pixels; it answers in UNITER's form. A pure function of the picture and the glyphs' boxes.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from engine.data.builtin import picture_sets
from engine.data.records.record import DataError, decode_image, parse_regions
from engine.data.records.regions import number_used
from engine.data.sources.shards import ShardSource
from engine.sections import Regions

_SIDE = 16  # pixels of a seen box
_MARGIN = 2  # pixels around a glyph in its loose box
# of cosine similarities to the known glyphs: a glyph's own box is nearly one-hot, half of it is not
_TEMPERATURE = 0.06
_BACKGROUND = 0.6  # similarity to be surpassed
_FEATURE_SCALE = 5.0  # pixels of -0.5..0.5 come to features of about 0.4 on average
_PROJECTION_KEY = 0x7265_6769_6F6E

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class SceneSource(ShardSource):
    """Scenes with the detector's regions: class 0 is the background, class 1 + k the k-th kind of glyph."""

    picture_roles = {False: "image", True: "image"}
    reader = "scene detector 1"

    def __init__(self, *args: Any, regions: Regions, **options: Any) -> None:
        if regions.classes <= picture_sets.NUM_KINDS:
            raise DataError(
                f'"{picture_sets.SCENES}" shows {picture_sets.NUM_KINDS} kinds of glyph, so data.regions.classes must '
                f"be at least {picture_sets.NUM_KINDS + 1}, got {regions.classes}"
            )
        super().__init__(*args, regions=regions, **options)

    def _region_arrays(self, image: int, names: Iterable[str]) -> tuple[bytes, dict[str, np.ndarray]]:
        assert self.regions is not None
        shard, row = self._locate(image)
        key = self._name(shard, row)
        glyphs = parse_regions(key, self._json(shard, row, key).get("regions") or [])
        data = self._read(shard, row, "image")
        picture = decode_image(key, data, self.max_image_pixels)
        return data, detect(picture, [glyph.box for glyph in glyphs], names, self.regions)


def detect(
    picture: Image.Image, glyphs: Sequence[Box], names: Iterable[str], options: Regions
) -> dict[str, np.ndarray]:
    """Those of the arrays of UNITER's npz that are asked for: the regions a run uses, the surest first."""
    boxes = _propose(picture, glyphs)
    seen = _look(picture, boxes)
    probabilities = _classify(seen)
    confidence = probabilities[:, 1:].max(1)
    used = np.argsort(-confidence, kind="stable")[: number_used(confidence, options)]
    arrays: dict[str, Callable[[], np.ndarray]] = {
        "features": lambda: np.maximum(seen[used] @ _projection(options.feature_values), 0),
        "norm_bb": lambda: _relative(boxes[used], picture.size),
        "conf": lambda: confidence[used],
        "soft_labels": lambda: _with_unseen_classes(probabilities[used], options.classes),
    }
    return {name: arrays[name]() for name in names}


def _propose(picture: Image.Image, glyphs: Sequence[Box]) -> np.ndarray:
    """[n, 4]: of each glyph its box, a loose box and four halves; neighbours together; the whole picture."""
    width, height = picture.size
    boxes: list[Box] = []
    for left, top, right, bottom in glyphs:
        boxes.append((left, top, right, bottom))
        loose = (
            max(left - _MARGIN, 0),
            max(top - _MARGIN, 0),
            min(right + _MARGIN, width),
            min(bottom + _MARGIN, height),
        )
        boxes.append(loose)
        middle, centre = (left + right) / 2, (top + bottom) / 2
        boxes += [(left, top, middle, bottom), (middle, top, right, bottom)]
        boxes += [(left, top, right, centre), (left, centre, right, bottom)]
    for one, other in zip(glyphs, glyphs[1:], strict=False):
        boxes.append((*map(min, one[:2], other[:2]), *map(max, one[2:], other[2:])))
    boxes.append((0, 0, width, height))
    return np.asarray(boxes, dtype=np.float32)


def _look(picture: Image.Image, boxes: np.ndarray) -> np.ndarray:
    """[n, 256] float32: the ink of each box, resized; -0.5 is white and 0.5 is black."""
    grey = picture.convert("L")
    size = (_SIDE, _SIDE)
    crops = [np.asarray(grey.resize(size, Image.Resampling.BOX, box=tuple(box))) for box in boxes.tolist()]
    return 0.5 - np.stack(crops).reshape(len(boxes), -1).astype(np.float32) / 255


def _classify(seen: np.ndarray) -> np.ndarray:
    """[n, 1 + kinds]: softmax of the similarities to the background and to the known glyphs."""
    similarities = np.full((len(seen), 1 + picture_sets.NUM_KINDS), _BACKGROUND, dtype=np.float32)
    similarities[:, 1:] = _directions(seen) @ _known_glyphs().T
    weights = np.exp((similarities - similarities.max(1, keepdims=True)) / _TEMPERATURE)
    return weights / weights.sum(1, keepdims=True)


@lru_cache(maxsize=1)
def _known_glyphs() -> np.ndarray:
    return _directions(
        np.concatenate([_look(glyph.picture, np.asarray([glyph.ink])) for glyph in picture_sets.scene_glyphs()])
    )


def _with_unseen_classes(probabilities: np.ndarray, classes: int) -> np.ndarray:
    return np.pad(probabilities, ((0, 0), (0, classes - probabilities.shape[1])))


def _directions(seen: np.ndarray) -> np.ndarray:
    return seen / np.linalg.norm(seen, axis=1, keepdims=True).clip(1e-6)


@lru_cache(maxsize=1)
def _projection(values: int) -> np.ndarray:
    """[256, values]: random signs, from raw Philox bits so that they stay the same for ever."""
    bits = np.random.Philox(key=_PROJECTION_KEY).random_raw(-(-(_SIDE**2) * values // 64)).astype("<u8")
    signs = np.unpackbits(bits.view(np.uint8), count=_SIDE**2 * values).astype(np.float32) * 2 - 1
    return signs.reshape(_SIDE**2, values) / _FEATURE_SCALE


def _relative(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[n, 6]: x1, y1, x2, y2, w, h as shares of the sides."""
    corners = boxes / np.asarray([*size, *size], dtype=np.float32)
    return np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1)
