"""impl "triton" on the device: a tile of pairs gives its losses, their derivatives and its share of three sums; see MATH.md."""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import triton_math
from vlkernels.core.triton_similarity import similarity_tile, store_weights, tile_of_wave

# Where a wave begins and how far apart its rows of weights are: multiples of 64 in every call, which make stores wide.
UNSPECIALIZED = ("rows", "columns", "partner")
UNALIGNED = ("image_labels", "text_labels", "scale", "bias", "sums")

# log(1 + e) = e P(e) for 0 <= e <= 1, off by 3e-8 of itself: losses near zero keep their digits.
P0, P1, P2 = tl.constexpr(1.0), tl.constexpr(-0.49999502), tl.constexpr(0.3331927)
P3, P4, P5 = tl.constexpr(-0.2484437), tl.constexpr(0.1911143), tl.constexpr(-0.1367477)
P6, P7, P8 = tl.constexpr(0.07836167), tl.constexpr(-0.029588507), tl.constexpr(0.005253458)


@triton.jit
def _log_one_plus(e):
    return ((((((((P8 * e + P7) * e + P6) * e + P5) * e + P4) * e + P3) * e + P2) * e + P1) * e + P0) * e


@triton.jit
def _halves(x):
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _quarters(x):
    """The columns of a tile in four runs: what is made of one at a time does not need registers for all."""
    left, right = _halves(x)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def _positives(image_labels, text_labels, images, texts, rows, columns, partner):
    if image_labels is None:
        positive = texts[None, :] == (images + partner)[:, None]
    else:
        of_images = tl.load(image_labels + images, mask=images < rows, other=0)
        of_texts = tl.load(text_labels + texts, mask=texts < columns, other=0)
        positive = of_images[:, None] == of_texts[None, :]
    return positive


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def pairs_kernel(
    image_base, text_base, image_labels, text_labels, scale, bias, weight_base, sums,
    first_row, first_column, rows, columns, partner, image_stride, text_stride, weight_stride, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """A tile of the wave of images ``first_row ..`` before ``rows`` and texts ``first_column ..`` before ``columns``.

    Text ``i + partner`` is the partner of image i, unless labels say who belongs together. ``weight_base`` takes ``factor`` times
    the derivatives of the losses by the logits; ``sums``, float32 [3, programs], the sums of losses, of derivatives times
    similarities and of derivatives.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    row, column = tile_of_wave(program, first_row, first_column, columns, ROWS, COLUMNS)
    tile = similarity_tile(
        image_base, text_base, row, column, rows, columns, image_stride, text_stride, ROWS, COLUMNS, DEPTH, WIDTH
    )
    images = row + tl.arange(0, ROWS)
    multiplier, summand = tl.load(scale), tl.load(bias)
    losses, of_scale, of_bias = (tl.zeros([ROWS], tl.float32),) * 3
    quarters = _quarters(tile)
    for k in tl.static_range(4):
        similarities, first_text = quarters[k], column + k * (COLUMNS // 4)
        texts = first_text + tl.arange(0, COLUMNS // 4)
        positive = _positives(image_labels, text_labels, images, texts, rows, columns, partner)
        inside = (images < rows)[:, None] & (texts < columns)[None, :]
        logits = similarities * multiplier + summand
        # Negated where the pair is positive, so that its loss is log(1 + exp(logit)).
        logits = tl.where(positive, -logits, logits)
        small = tl.exp2(-tl.abs(logits) * triton_math.LOG2_E)
        losses += tl.sum(tl.where(inside, tl.maximum(logits, 0.0) + _log_one_plus(small), 0.0), 1)
        if GRADIENT:
            derivatives = tl.where(logits > 0.0, 1.0, small) / (1.0 + small)
            derivatives = tl.where(inside, tl.where(positive, -derivatives, derivatives), 0.0)
            of_scale += tl.sum(derivatives * similarities, 1)
            of_bias += tl.sum(derivatives, 1)
            store_weights(
                weight_base, weight_stride, derivatives * factor, row, first_text, first_row, first_column, rows, columns,
                ROWS, COLUMNS // 4,
            )  # fmt: skip
    tl.store(sums + program, tl.sum(losses))
    if GRADIENT:
        tl.store(sums + programs + program, tl.sum(of_scale))
        tl.store(sums + 2 * programs + program, tl.sum(of_bias))
