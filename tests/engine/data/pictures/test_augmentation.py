"""RandAugment: which operations, how often, how strong, in both directions."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from engine.data.pictures import augmentation
from engine.data.pictures.augmentation import NAMES, rand_augment
from engine.data.pictures.transform import ImageTransform

DOT = Image.new("RGB", (64, 64), "white")
DOT.paste((0, 0, 0), (36, 28, 40, 32))  # around (38, 30)


def darkest(image):
    """Its place from the middle."""
    weights = np.maximum(255.0 - np.asarray(image.convert("L")) - 130, 0)  # the grey fill has none
    rows, columns = np.indices(weights.shape)
    middle = (64 - 1) / 2
    return (weights * columns).sum() / weights.sum() - middle, (weights * rows).sum() / weights.sum() - middle


@pytest.mark.parametrize("sign", [1, -1])
def test_operations_that_move_do_so_by_seven_tenths_of_their_range(sign):
    x, y = darkest(DOT)

    def moved(name):
        return darkest(augmentation._AUGMENTATIONS[name](DOT, sign))

    assert np.allclose(moved("translate_x"), (x + 7 * sign, y), atol=0.1)
    assert np.allclose(moved("translate_y"), (x, y + 7 * sign), atol=0.1)
    angle = np.deg2rad(21 * sign)  # against the clock; rows grow downwards
    turned = (x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle))
    assert np.allclose(moved("rotate"), turned, atol=0.3)
    row, column = y + 31.5, x + 31.5
    assert np.allclose(moved("shear_x"), (x + 0.21 * sign * row, y), atol=0.6)
    assert np.allclose(moved("shear_y"), (x, y + 0.21 * sign * column), atol=0.6)


def test_operations_that_do_not_move_change_light_alone():
    grey = Image.fromarray(np.tile(np.arange(60, 124, dtype=np.uint8), (64, 1))).convert("RGB")
    found = {name: np.asarray(augmentation._AUGMENTATIONS[name](grey, 1)) for name in NAMES}
    assert np.array_equal(found["identity"], np.asarray(grey))
    assert np.abs(found["brightness"].astype(int) - np.asarray(grey) * 1.36).max() <= 1
    assert (found["auto_contrast"].min(), found["auto_contrast"].max()) == (0, 255)
    assert (found["equalize"][:, -1] > 240).all()
    assert np.array_equal(found["sharpness"][:, 5:-5], np.asarray(grey)[:, 5:-5])  # a ramp has no edges


def test_two_of_ten_are_drawn_and_each_is_carried_out_half_the_time(monkeypatch):
    done = Counter()
    for name in NAMES:

        def counted(image, sign, name=name):
            done[name, sign] += 1
            return image

        monkeypatch.setitem(augmentation._AUGMENTATIONS, name, counted)
    for seed in range(4000):
        rand_augment(DOT, np.random.default_rng(seed))
    assert abs(done.total() / 4000 - 1) < 4 * np.sqrt(0.5 / 4000)
    assert len(done) == 20 and min(done.values()) > 120 and len(NAMES) == 10


def test_training_pictures_alone_are_augmented_and_draws_repeat():
    transform = ImageTransform(64, 16, (4, 4), (0.5,) * 3, (0.5,) * 3, augment="rand_augment")
    plain = ImageTransform(64, 16, (4, 4), (0.5,) * 3, (0.5,) * 3)
    still = transform(DOT)[0]
    assert np.array_equal(still, plain(DOT)[0])
    one, again, other = (transform(DOT, np.random.default_rng(seed))[0] for seed in (2, 2, 3))
    assert np.array_equal(one, again) and not np.array_equal(one, other) and one.shape == still.shape


def test_pixels_are_what_patches_are_cut_from():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    transform = ImageTransform(32, 8, (4, 4), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), random_crop="resized")
    patches = transform(picture, np.random.default_rng(1))[0].reshape(4, 4, 3, 8, 8)
    pixels = transform.pixels(picture, np.random.default_rng(1))
    assert pixels.dtype == np.float32 and pixels.flags.c_contiguous
    assert np.array_equal(pixels, patches.transpose(2, 0, 3, 1, 4).reshape(3, 32, 32))
