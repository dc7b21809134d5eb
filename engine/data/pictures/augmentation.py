"""RandAugment as ALBEF and BLIP use it: two of ten operations at magnitude 7 of 10, each carried out half the time.

Cubuk et al. (2020) with the list of operations that leaves colours alone, which captions name. Nothing is mirrored:
captions say left and right.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

OPERATIONS = 2  # drawn for a picture, with replacement
_SHARE = 0.7  # magnitude 7 of 10
_CARRIED_OUT = 0.5
_FILL = (128, 128, 128)
_FACTOR = 0.1 + 1.8 * _SHARE  # of brightness and sharpness; 1 changes nothing
_SHEAR = 0.3 * _SHARE
_PIXELS = 10 * _SHARE
_DEGREES = 30 * _SHARE


def _moved(image: Image.Image, *coefficients: float) -> Image.Image:
    """The pixel at (x, y) is taken from (a x + b y + c, d x + e y + f)."""
    how = Image.Resampling.BILINEAR
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample=how, fillcolor=_FILL)


_AUGMENTATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, sign: image,
    "auto_contrast": lambda image, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, sign: ImageOps.equalize(image),
    "brightness": lambda image, sign: ImageEnhance.Brightness(image).enhance(_FACTOR),
    "sharpness": lambda image, sign: ImageEnhance.Sharpness(image).enhance(_FACTOR),
    "shear_x": lambda image, sign: _moved(image, 1, -sign * _SHEAR, 0, 0, 1, 0),
    "shear_y": lambda image, sign: _moved(image, 1, 0, 0, -sign * _SHEAR, 1, 0),
    "translate_x": lambda image, sign: _moved(image, 1, 0, -sign * _PIXELS, 0, 1, 0),
    "translate_y": lambda image, sign: _moved(image, 1, 0, 0, 0, 1, -sign * _PIXELS),
    "rotate": lambda image, sign: image.rotate(sign * _DEGREES, Image.Resampling.BILINEAR, fillcolor=_FILL),
}
"""By name; those that move the picture do so in the direction of `sign`."""

NAMES = tuple(_AUGMENTATIONS)


def rand_augment(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """An RGB picture of the same size."""
    for name in random.choice(NAMES, size=OPERATIONS).tolist():
        carried_out, sign = random.random() < _CARRIED_OUT, 1.0 if random.random() < 0.5 else -1.0
        if carried_out:
            image = _AUGMENTATIONS[name](image, sign)
    return image
