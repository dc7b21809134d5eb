"""Image transforms: resize, random crop, flip, and the cut into patches."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from engine.data.pictures.augmentation import rand_augment

_ASPECT_RANGE = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class ImageTransform:
    """PIL image -> (patches [P, 3 * patch * patch] float32, their rows and columns in the grid [P, 2] int32).

    A patch is flattened in (channel, row, column) order.
    resize: "squash" (both sides `size`), "shorter" (the shorter side, then a centre square), "fit" (the
    shorter side; the aspect ratio is kept, sides rounded to whole patches, at most `max_grid` of them).
    random_crop: "none", "resized" (a random area, resized to a square), "translate" (moved by up to
    size // 16 pixels, edges repeated). Random choices are made only when a generator is given.
    augment: "none", or "rand_augment" behind the crop.
    """

    size: int
    patch: int
    max_grid: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "squash"
    random_crop: str = "none"
    random_crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = False
    augment: str = "none"

    def __call__(
        self, image: Image.Image, random: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._patches(self._drawn(image, random))

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches of every picture; None where they differ."""
        side = self.size // self.patch
        return None if self.resize == "fit" else (side, side)

    def pixels(self, image: Image.Image, random: np.random.Generator | None = None) -> np.ndarray:
        """float32 [3, H, W], for a convolutional backbone."""
        return np.ascontiguousarray(self._scaled(self._drawn(image, random)).transpose(2, 0, 1))

    def _drawn(self, image: Image.Image, random: np.random.Generator | None) -> np.ndarray:
        """uint8 [H, W, 3]."""
        crop = random is not None and self.random_crop == "resized"
        resized = self._crop_resized(image, random) if crop else self._resized(image)
        if random is not None and self.augment == "rand_augment":
            resized = rand_augment(resized, random)
        pixels = np.asarray(resized)
        if random is not None and self.random_crop == "translate":
            pixels = _translate(pixels, self.size // 16, random)
        if random is not None and self.flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        return pixels

    def _resized(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.resize == "shorter":
            return self._centre(image)
        target = self._fitting_size(width, height) if self.resize == "fit" else (self.size, self.size)
        return _resample(image, target, (0.0, 0.0, float(width), float(height)))

    def _centre(self, image: Image.Image) -> Image.Image:
        """Of the whole picture, resized to whole pixels, as CLIP has it: cut first, it would lie up to a pixel beside."""
        width, height = (self.size * side // min(image.size) for side in image.size)
        resized = _resample(image, (width, height), (0.0, 0.0, *map(float, image.size)))
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return resized.crop((left, top, left + self.size, top + self.size))

    def _fitting_size(self, width: int, height: int) -> tuple[int, int]:
        rows, columns = (limit * self.patch for limit in self.max_grid)
        scale = min(self.size / min(width, height), rows / height, columns / width)
        whole = [max(1, round(side * scale / self.patch)) * self.patch for side in (width, height)]
        return whole[0], whole[1]

    def _crop_resized(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        width, height = image.size
        area = width * height * random.uniform(*self.random_crop_scale)
        aspect = math.exp(random.uniform(*(math.log(limit) for limit in _ASPECT_RANGE)))
        crop_width, crop_height = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
        left, top = random.uniform(0, width - crop_width), random.uniform(0, height - crop_height)
        return _resample(image, (self.size, self.size), (left, top, left + crop_width, top + crop_height))

    def _patches(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = pixels.shape[0] // self.patch, pixels.shape[1] // self.patch
        grid = self._scaled(pixels).reshape(rows, self.patch, columns, self.patch, 3).transpose(0, 2, 4, 1, 3)
        return grid.reshape(rows * columns, -1), grid_positions(rows, columns)

    def _scaled(self, pixels: np.ndarray) -> np.ndarray:
        std = np.asarray(self.std, dtype=np.float32)
        return pixels * (1 / (255 * std)) - np.asarray(self.mean, dtype=np.float32) / std


def _resample(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]
) -> Image.Image:
    if size == image.size and box == (0, 0, *image.size):
        return image
    return image.resize(size, Image.Resampling.BICUBIC, box=box)


def _translate(pixels: np.ndarray, reach: int, random: np.random.Generator) -> np.ndarray:
    shifts = random.integers(-reach, reach + 1, size=2)
    rows, columns = (
        np.minimum(np.maximum(np.arange(shift, shift + side), 0), side - 1)
        for side, shift in zip(pixels.shape[:2], shifts, strict=True)
    )
    return pixels.take(rows, axis=0).take(columns, axis=1)


@lru_cache
def grid_positions(rows: int, columns: int) -> np.ndarray:
    return np.indices((rows, columns), dtype=np.int32).reshape(2, -1).T
