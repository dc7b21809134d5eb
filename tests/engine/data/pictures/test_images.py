"""Image transforms: sizes, the order inside patches, normalisation, random choices."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data import ImageTransform

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)


def transform(**changes):
    return ImageTransform(
        **{"size": 32, "patch": 8, "max_grid": (12, 12), "mean": MEAN, "std": STD, **changes}
    )


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rebuilt(patches, positions, patch=8):
    """Pixels in 0..255 from patches, each put where its position says."""
    rows, columns = positions.max(0) + 1
    pixels = np.zeros((rows * patch, columns * patch, 3))
    for values, (row, column) in zip(patches, positions, strict=True):
        block = values.reshape(3, patch, patch).transpose(1, 2, 0)
        pixels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = block
    return np.rint((pixels * STD + MEAN) * 255).astype(int)


def test_patches_hold_the_normalised_pixels_in_the_order_of_a_convolution():
    image = noise(32, 32)
    patches, positions = transform()(image)
    assert patches.dtype == np.float32 and positions.dtype == np.int32 and positions.shape == (16, 2)
    assert np.array_equal(rebuilt(patches, positions), np.asarray(image))
    weight = torch.randn(5, 3, 8, 8)
    pixels = (
        torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]
    ) / torch.tensor(STD)[:, None, None]
    convolved = torch.nn.functional.conv2d(pixels[None], weight, stride=8)[0].flatten(1).T
    torch.testing.assert_close(
        torch.from_numpy(patches) @ weight.reshape(5, -1).T, convolved, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "resize, size, grid",
    [
        ("fit", (32, 32), (4, 4)),
        ("fit", (64, 32), (4, 8)),
        ("fit", (32, 96), (12, 4)),
        ("fit", (640, 480), (4, 5)),
        ("fit", (3000, 20), (1, 12)),
        ("fit", (1, 3000), (12, 1)),
        ("fit", (16, 8), (4, 8)),
        ("squash", (64, 32), (4, 4)),
        ("shorter", (3000, 20), (4, 4)),
        ("shorter", (1, 5000), (4, 4)),
    ],
)
def test_grids(resize, size, grid):
    patches, positions = transform(resize=resize)(noise(*size))
    assert tuple(positions.max(0) + 1) == grid and len(patches) == grid[0] * grid[1]
    assert positions.tolist() == [[row, column] for row in range(grid[0]) for column in range(grid[1])]


def test_shorter_takes_the_centre():
    image = noise(32, 32)
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste(image, (32, 0))
    assert np.array_equal(rebuilt(*transform(resize="shorter")(wide)), np.asarray(image))


def test_translations_reach_two_pixels_each_way_and_repeat_the_edge():
    image = noise(32, 32)
    pixels = np.asarray(image)
    padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)), mode="edge")
    views = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(5) for x in range(5)}
    move = transform(random_crop="translate")
    found = {
        views[rebuilt(*move(image, np.random.default_rng(seed))).astype(np.uint8).tobytes()]
        for seed in range(300)
    }
    assert found == set(views.values())


def test_resized_crops_differ_and_stay_inside():
    crop = transform(random_crop="resized", random_crop_scale=(0.2, 0.6))
    image = Image.new("RGB", (100, 40), (10, 200, 30))
    for seed in range(50):
        patches, positions = crop(image, np.random.default_rng(seed))
        assert len(patches) == 16 and (rebuilt(patches, positions) == (10, 200, 30)).all()
    image = noise(100, 40)
    assert len({crop(image, np.random.default_rng(seed))[0].tobytes() for seed in range(20)}) == 20
    assert transform(random_crop="resized")(Image.new("RGB", (1, 1)), np.random.default_rng(0))[0].shape == (
        16,
        192,
    )


def test_flips_happen_half_of_the_time_and_only_on_request():
    image = noise(32, 32)
    pixels, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    results = [rebuilt(*transform(flip=True)(image, np.random.default_rng(seed))) for seed in range(200)]
    flipped = sum(np.array_equal(result, mirrored) for result in results)
    assert 70 < flipped < 130 and flipped + sum(np.array_equal(result, pixels) for result in results) == 200
    for seed in range(20):
        assert np.array_equal(rebuilt(*transform()(image, np.random.default_rng(seed))), pixels)


def test_without_a_generator_nothing_is_random():
    image = noise(40, 60)
    plain, _ = transform()(image)
    for random_crop in ("resized", "translate"):
        assert np.array_equal(transform(random_crop=random_crop, flip=True)(image)[0], plain)
