"""impl "triton" on the device: hardest negatives as integers that have a largest one, hinges of all negatives; see MATH.md."""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core.triton_similarity import similarity_tile, store_weights, tile_of_wave

# Where a wave begins and how far apart its rows of weights are: multiples of 64 in every call, which make stores wide.
UNSPECIALIZED = ("rows", "columns", "partner", "image_start", "text_start")
UNALIGNED = (
    "image_labels", "text_labels", "of_images", "of_texts", "least_images", "least_texts", "image_pushes", "text_pushes", "sums",
)  # fmt: skip
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _negatives(similarities, image_labels, text_labels, images, texts, rows, columns, partner):
    """Minus infinity for pairs that are positive and for rows and columns past the end."""
    if image_labels is None:
        positive = texts[None, :] == (images + partner)[:, None]
    else:
        of_images = tl.load(image_labels + images, mask=images < rows, other=0)
        of_texts = tl.load(text_labels + texts, mask=texts < columns, other=0)
        positive = of_images[:, None] == of_texts[None, :]
    inside = (images < rows)[:, None] & (texts < columns)[None, :]
    return tl.where(inside & (positive == 0), similarities, -float("inf"))


@triton.jit
def _ranked(similarity, place):
    """int64 in the order of similarities, of equal ones the first place the largest; ``tiles.unranked`` is the inverse."""
    bits = similarity.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & MAGNITUDE)
    return (ordered.to(tl.int64) << 32) | (place ^ MAGNITUDE).to(tl.int64)


@triton.jit
def _tile_of_band(program, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr):
    """(row, column) where the tile of a program begins: down a band of ``BAND`` tiles of rows, then down its next column.

    Programs that run together then read few rows of either side; along rows they would read other columns each.
    """
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first, inside = program // (BAND * across) * BAND, program % (BAND * across)
    height = tl.minimum(down - first, BAND)
    return (first + inside % height) * ROWS, inside // height * COLUMNS


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def hardest_kernel(
    image_base, text_base, image_labels, text_labels, of_images, of_texts, rows, columns, partner, image_start, text_start,
    image_stride, text_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Raise the ranks of the hardest negatives, int64, of the images and of the texts of a tile.

    Places count from ``image_start`` and ``text_start``. A maximum of integers is the same in every order of programs.
    """
    row, column = _tile_of_band(tl.program_id(0), rows, columns, ROWS, COLUMNS, BAND)
    similarities = similarity_tile(
        image_base, text_base, row, column, rows, columns, image_stride, text_stride, ROWS, COLUMNS, DEPTH, WIDTH
    )  # fmt: skip
    images, texts = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    negatives = _negatives(similarities, image_labels, text_labels, images, texts, rows, columns, partner)
    largest, place = tl.max(negatives, 1, return_indices=True)
    tl.atomic_max(of_images + images, _ranked(largest, text_start + column + place), mask=images < rows, sem="relaxed")
    largest, place = tl.max(negatives, 0, return_indices=True)
    tl.atomic_max(of_texts + texts, _ranked(largest, image_start + row + place), mask=texts < columns, sem="relaxed")


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def exceeding_kernel(
    image_base, text_base, image_labels, text_labels, least_images, least_texts, weight_base, image_pushes, text_pushes, sums,
    first_row, first_column, rows, columns, partner, image_stride, text_stride, weight_stride, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """What the negatives of a tile exceed the least similarities that cost by, of their images and of their texts.

    ``sums``: float32 [programs]; ``weight_base`` takes ``factor`` times the number of the two that each exceeds; the pushes,
    int32, count them by image and by text.
    """
    row, column = tile_of_wave(tl.program_id(0), first_row, first_column, columns, ROWS, COLUMNS)
    similarities = similarity_tile(
        image_base, text_base, row, column, rows, columns, image_stride, text_stride, ROWS, COLUMNS, DEPTH, WIDTH
    )  # fmt: skip
    images, texts = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    negatives = _negatives(similarities, image_labels, text_labels, images, texts, rows, columns, partner)
    of_images = negatives - tl.load(least_images + images, mask=images < rows, other=0.0)[:, None]
    of_texts = negatives - tl.load(least_texts + texts, mask=texts < columns, other=0.0)[None, :]
    excess = tl.sum(tl.maximum(of_images, 0.0) + tl.maximum(of_texts, 0.0), 1)
    if GRADIENT:
        pushing_images, pushing_texts = (of_images > 0.0).to(tl.int32), (of_texts > 0.0).to(tl.int32)
        weights = (pushing_images + pushing_texts).to(tl.float32)
        store_weights(
            weight_base, weight_stride, weights * factor, row, column, first_row, first_column, rows, columns, ROWS, COLUMNS
        )  # fmt: skip
        # Counts of integers are the same in every order of programs.
        tl.atomic_add(image_pushes + images, tl.sum(pushing_images, 1), mask=images < rows, sem="relaxed")
        tl.atomic_add(text_pushes + texts, tl.sum(pushing_texts, 0), mask=texts < columns, sem="relaxed")
    tl.store(sums + tl.program_id(0), tl.sum(excess))


@triton.jit(do_not_specialize_on_alignment=("places", "order", "bounds"))
def gather_kernel(
    feature_base, places, order, bounds, toward_base, feature_stride, toward_stride,
    TAKEN: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add to a row the feature at its own place, unless that is -1, and those that were ordered to it, one after another:
    the features ``order[bounds[row]] ..`` before ``bounds[row + 1]``."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    place = tl.load(places + row)
    own = tl.load(feature_base + place * feature_stride + columns, mask=inside & (place >= 0), other=0.0).to(tl.float32)
    met = tl.zeros([TAKEN, COLUMNS], tl.float32)
    end = tl.load(bounds + row + 1)
    for first in range(tl.load(bounds + row), end, TAKEN):
        taken = first + tl.arange(0, TAKEN)
        features = tl.load(order + taken, mask=taken < end, other=0)
        pointers = feature_base + features[:, None] * feature_stride + columns[None, :]
        met += tl.load(pointers, mask=(taken < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    pointers = toward_base + row.to(tl.int64) * toward_stride + columns
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + own + tl.sum(met, 0), mask=inside)
