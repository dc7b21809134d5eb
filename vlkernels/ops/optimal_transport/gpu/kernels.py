"""The Triton kernels of the transport distance: plans of packed samples, and the gradients that a plan gives their tokens.

A matrix of a sample is [texts, images]. ``K = exp(cosine / beta)``: the missing ``exp(-1 / beta)`` cancels in the scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlkernels.core import triton_math
from vlkernels.ops.optimal_transport import reference

SMALLEST_NORM, SMALLEST_SHARE = tl.constexpr(reference.SMALLEST_NORM), tl.constexpr(reference.SMALLEST_SHARE)

# Numbers that differ between calls of one model: specialising on them would compile a variant for each.
UNSPECIALIZED = (
    "samples", "image_segments", "text_segments", "image_segment", "text_segment", "longest_image", "longest_text",
    "image_rows", "text_rows", "beta", "iterations",
)  # fmt: skip
# May be part of a larger tensor, at any place of it; they are read number by number.
UNALIGNED = ("image_starts", "image_lengths", "text_starts", "text_lengths")


@triton.jit
def _place(starts, lengths, sample, segments, segment):
    """(first row, rows) of a segment of a sample."""
    where = sample * segments + segment
    return tl.load(starts + where), tl.load(lengths + where)


@triton.jit
def _load_rows(base, first, rows, column, width, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """[ROWS, DEPTH] from row ``first`` and a column on, zero past ``rows`` and past the width."""
    row, depth = tl.arange(0, ROWS)[:, None], column + tl.arange(0, DEPTH)[None, :]
    start = first  # a tensor in the interpreter too, where the counter of a loop is an int
    pointers = base + start.to(tl.int64) * width + (row * width + depth)
    return tl.load(pointers, mask=(row < rows) & (depth < width), other=0.0)


@triton.jit
def _product(a, b, acc):
    """``acc + a b``: half types multiply as such, float32 on tensor cores in three parts, to 21 bits or more."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _products(
    text_base, image_base, first_text, texts, first_image, images, width,
    TEXTS: tl.constexpr, IMAGES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(products of all pairs, squares of the norms of texts, of images); zero past the last text and image."""
    products = tl.zeros([TEXTS, IMAGES], tl.float32)
    text_squares, image_squares = tl.zeros([TEXTS], tl.float32), tl.zeros([IMAGES], tl.float32)
    for column in range(0, width, DEPTH):
        x = _load_rows(text_base, first_text, texts, column, width, TEXTS, DEPTH)
        y = _load_rows(image_base, first_image, images, column, width, IMAGES, DEPTH)
        products = _product(x, tl.trans(y), products)
        wide_x, wide_y = x.to(tl.float32), y.to(tl.float32)
        text_squares += tl.sum(wide_x * wide_x, 1)
        image_squares += tl.sum(wide_y * wide_y, 1)
    return products, text_squares, image_squares


@triton.jit
def _unit(squares):
    """What a token of these squares is multiplied by."""
    return 1.0 / tl.maximum(tl.sqrt_rn(squares), SMALLEST_NORM)


@triton.jit
def _kernel(cosines, beta):
    return tl.exp2(cosines * (triton_math.LOG2_E / beta))


@triton.jit
def _weighted(kernel, plan):
    return kernel * tl.where(plan < SMALLEST_SHARE, SMALLEST_SHARE, plan)


@triton.jit
def _scale(count, sums, present):
    return tl.where(present, 1.0 / (count * sums), 0.0)


@triton.jit
def _store_factors(factors, share_offset, rows, count, squares, along):
    """For the gradient: one over the norm of every token, and its share of ``x^ . dx^``, 0 where the norm is a constant.

    ``along`` is ``x^ . dx^`` less the cotangent, and is divided by ``x^ . x^``: one but for rounding, which would not cancel.
    """
    unit = _unit(squares)
    share = tl.where(tl.sqrt_rn(squares) >= SMALLEST_NORM, along / (squares * unit * unit), 0.0)
    tl.store(factors + rows, unit, mask=rows < count)
    tl.store(factors + share_offset + rows, share, mask=rows < count)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def resident_kernel(
    image_base, text_base, image_starts, image_lengths, text_starts, text_lengths, distances, plans, factors,
    width, samples, image_segments, text_segments, image_segment, text_segment, longest_image, longest_text, beta, iterations,
    TEXTS: tl.constexpr, IMAGES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Distance and plan of a sample whose matrices fit into the registers of a program."""
    sample = tl.program_id(0)
    first_text, m = _place(text_starts, text_lengths, sample, text_segments, text_segment)
    first_image, n = _place(image_starts, image_lengths, sample, image_segments, image_segment)
    text, image = tl.arange(0, TEXTS), tl.arange(0, IMAGES)
    is_text, is_image = text < m, image < n
    is_pair = is_text[:, None] & is_image[None, :]
    products, text_squares, image_squares = _products(
        text_base, image_base, first_text, m, first_image, n, width, TEXTS, IMAGES, DEPTH
    )
    cosines = tl.where(is_pair, products * _unit(text_squares)[:, None] * _unit(image_squares)[None, :], 0.0)
    kernel = _kernel(cosines, beta)
    plan = tl.where(is_pair, 1.0, 0.0)
    text_scale = tl.where(is_text, 1.0 / m, 0.0)
    for _ in range(0, tl.where((m > 0) & (n > 0), iterations, 0)):
        weighted = _weighted(kernel, plan)
        image_scale = _scale(n, tl.sum(weighted * text_scale[:, None], 0), is_image)
        sent = weighted * image_scale[None, :]
        text_scale = _scale(m, tl.sum(sent, 1), is_text)
        plan = sent * text_scale[:, None]
    carried = tl.sum(plan * (1.0 - cosines), 1)[:, None]  # two dimensions: Triton 3.7 fails on the sum of one, for sm_100
    tl.store(distances + sample + tl.arange(0, 1), tl.sum(carried, 0))
    if plans is not None:
        own = plans + sample.to(tl.int64) * longest_text * longest_image
        tl.store(own + text[:, None] * longest_image + image[None, :], plan, mask=is_pair)
        longest, along = longest_text + longest_image, plan * cosines
        of_texts, share_offset = factors + sample.to(tl.int64) * longest, samples.to(tl.int64) * longest
        _store_factors(of_texts, share_offset, text, m, text_squares, tl.sum(along, 1))
        _store_factors(of_texts + longest_text, share_offset, image, n, image_squares, tl.sum(along, 0))


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def streaming_kernel(
    image_base, text_base, image_starts, image_lengths, text_starts, text_lengths, distances, plans, cosines, factors,
    width, samples, image_segments, text_segments, image_segment, text_segment, longest_image, longest_text, beta, iterations,
    TEXTS: tl.constexpr, IMAGES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Distance and plan of a sample whose matrices pass through a program in each step, some texts with all images at a time.

    A text's scale needs its row alone, so what is left of a step and the sums of the next one are one visit. Between visits
    ``plans`` holds ``K max(T, 1e-35)``.
    """
    sample = tl.program_id(0)
    first_text, texts = _place(text_starts, text_lengths, sample, text_segments, text_segment)
    first_image, images = _place(image_starts, image_lengths, sample, image_segments, image_segment)
    m, n = tl.where(images > 0, texts, 0), tl.where(texts > 0, images, 0)
    image = tl.arange(0, IMAGES)
    own = sample.to(tl.int64) * longest_text * longest_image
    plans += own
    cosines += own
    longest = longest_text + longest_image
    of_texts, share_offset = factors + sample.to(tl.int64) * longest, samples.to(tl.int64) * longest
    sums, image_squares = tl.zeros([IMAGES], tl.float32), tl.zeros([IMAGES], tl.float32)
    for begin in range(0, m, TEXTS):
        text = begin + tl.arange(0, TEXTS)
        place, inside = text[:, None] * longest_image + image[None, :], (text < m)[:, None] & (image < n)[None, :]
        products, text_squares, image_squares = _products(
            text_base, image_base, first_text + begin, m - begin, first_image, n, width, TEXTS, IMAGES, DEPTH
        )
        cosine = products * _unit(text_squares)[:, None] * _unit(image_squares)[None, :]
        weighted = tl.where(inside, _kernel(cosine, beta), 0.0)
        tl.store(cosines + place, cosine, mask=inside)
        tl.store(plans + place, weighted, mask=inside)
        tl.store(of_texts + share_offset + text, text_squares, mask=text < m)
        sums += tl.sum(weighted / m, 0)
    image_scale = _scale(n, sums, image < n)
    for _ in range(1, iterations):
        tl.debug_barrier()
        sums = tl.zeros([IMAGES], tl.float32)
        for begin in range(0, m, TEXTS):
            text = begin + tl.arange(0, TEXTS)
            place, inside = text[:, None] * longest_image + image[None, :], (text < m)[:, None] & (image < n)[None, :]
            sent = tl.load(plans + place, mask=inside, other=0.0) * image_scale[None, :]
            text_scale = _scale(m, tl.sum(sent, 1), text < m)
            kernel = _kernel(tl.load(cosines + place, mask=inside, other=0.0), beta)
            weighted = tl.where(inside, _weighted(kernel, sent * text_scale[:, None]), 0.0)
            tl.store(plans + place, weighted, mask=inside)
            sums += tl.sum(weighted * text_scale[:, None], 0)
        image_scale = _scale(n, sums, image < n)
    tl.debug_barrier()
    distance, of_images = tl.zeros([IMAGES], tl.float32), tl.zeros([IMAGES], tl.float32)
    for begin in range(0, m, TEXTS):
        text = begin + tl.arange(0, TEXTS)
        place, inside = text[:, None] * longest_image + image[None, :], (text < m)[:, None] & (image < n)[None, :]
        sent = tl.load(plans + place, mask=inside, other=0.0) * image_scale[None, :]
        plan = sent * _scale(m, tl.sum(sent, 1), text < m)[:, None]
        cosine = tl.load(cosines + place, mask=inside, other=0.0)
        distance += tl.sum(plan * (1.0 - cosine), 0)
        of_images += tl.sum(plan * cosine, 0)
        tl.store(plans + place, plan, mask=inside)
        text_squares = tl.load(of_texts + share_offset + text, mask=text < m, other=0.0)
        _store_factors(of_texts, share_offset, text, m, text_squares, tl.sum(plan * cosine, 1))
    tl.store(distances + sample, tl.sum(distance, 0))
    _store_factors(of_texts + longest_text, share_offset, image, n, image_squares, of_images)


@triton.jit
def _clear(base, first, stop, width, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Zeros in the rows [first, stop), which belong to nobody."""
    row, depth = tl.arange(0, ROWS)[:, None], tl.arange(0, DEPTH)[None, :]
    zeros = tl.zeros([ROWS, DEPTH], base.dtype.element_ty)
    for begin in range(first, stop, ROWS):
        start = begin
        pointers = base + start.to(tl.int64) * width
        for column in range(0, width, DEPTH):
            inside = (row < stop - begin) & (column + depth < width)
            tl.store(pointers + (row * width + column + depth), zeros, mask=inside)


@triton.jit
def _clear_nobodys(
    base, starts, lengths, sample, samples, segments, segment, rows, width, ROWS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Zeros between this segment of a sample and the next one's; of what lies past the last, a program's equal part."""
    first, count = _place(starts, lengths, sample, segments, segment)
    last_first, last_count = _place(starts, lengths, samples - 1, segments, segment)
    past = last_first + last_count
    following, _ = _place(starts, lengths, tl.minimum(sample + 1, samples - 1), segments, segment)
    _clear(base, first + count, tl.where(sample + 1 < samples, following, first + count), width, ROWS, DEPTH)
    _clear(base, 0, tl.where(sample == 0, first, 0), width, ROWS, DEPTH)
    part = tl.cdiv(rows - past, samples)
    _clear(base, past + sample * part, tl.minimum(past + (sample + 1) * part, rows), width, ROWS, DEPTH)


@triton.jit
def _side_gradient(
    own_base, other_base, out, plan, own_stride, other_stride, own_factors, other_factors, share_offset,
    first, count, other_first, other_count, tile, cotangent, width,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows of a tile of one side, which meet all rows of the other side."""
    row = tile * ROWS + tl.arange(0, ROWS)
    left = count - tile * ROWS
    unit = tl.load(own_factors + row, mask=row < count, other=0.0)
    share = tl.load(own_factors + share_offset + row, mask=row < count, other=0.0)
    factor = -cotangent * unit  # the cost falls as the cosine rises
    for column in range(0, tl.where(left > 0, width, 0), DEPTH):
        toward = tl.zeros([ROWS, DEPTH], tl.float32)
        for begin in range(0, other_count, OTHERS):
            other = begin + tl.arange(0, OTHERS)
            met = other < other_count
            weights = tl.load(
                plan + row[:, None] * own_stride + other[None, :] * other_stride,
                mask=(row < count)[:, None] & met[None, :], other=0.0,
            )  # fmt: skip
            values = _load_rows(other_base, other_first + begin, other_count - begin, column, width, OTHERS, DEPTH)
            other_unit = tl.load(other_factors + other, mask=met, other=0.0)
            toward = _product(weights, values.to(tl.float32) * other_unit[:, None], toward)
        values = _load_rows(own_base, first + tile * ROWS, left, column, width, ROWS, DEPTH)
        gradient = factor[:, None] * (toward - values.to(tl.float32) * (unit * share)[:, None])
        gradient = tl.where(other_count > 0, gradient, 0.0)
        depth = column + tl.arange(0, DEPTH)
        pointers = out + (first + row).to(tl.int64)[:, None] * width + depth[None, :]
        tl.store(pointers, gradient.to(out.dtype.element_ty), mask=(row < count)[:, None] & (depth < width)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def gradient_kernel(
    grad_distances, image_base, text_base, image_starts, image_lengths, text_starts, text_lengths, plans, factors,
    grad_images, grad_texts, width, samples, image_segments, text_segments, image_segment, text_segment,
    longest_image, longest_text, image_rows, text_rows,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of the texts or of the images of a sample, and zeros in the rows of nobody."""
    text_tiles = tl.cdiv(longest_text, ROWS)
    tiles = text_tiles + tl.cdiv(longest_image, ROWS)
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first_text, m = _place(text_starts, text_lengths, sample, text_segments, text_segment)
    first_image, n = _place(image_starts, image_lengths, sample, image_segments, image_segment)
    cotangent = tl.load(grad_distances + sample)
    plan = plans + sample.to(tl.int64) * longest_text * longest_image
    longest = longest_text + longest_image
    of_texts = factors + sample.to(tl.int64) * longest
    of_images, share_offset = of_texts + longest_text, samples.to(tl.int64) * longest
    if tile < text_tiles:
        _side_gradient(
            text_base, image_base, grad_texts, plan, longest_image, 1, of_texts, of_images, share_offset,
            first_text, m, first_image, n, tile, cotangent, width, ROWS, OTHERS, DEPTH,
        )  # fmt: skip
    else:
        _side_gradient(
            image_base, text_base, grad_images, plan, 1, longest_image, of_images, of_texts, share_offset,
            first_image, n, first_text, m, tile - text_tiles, cotangent, width, ROWS, OTHERS, DEPTH,
        )  # fmt: skip
    if tile == 0:
        _clear_nobodys(
            grad_texts, text_starts, text_lengths, sample, samples, text_segments, text_segment, text_rows, width, ROWS, DEPTH
        )
    if tile == tiles - 1:
        _clear_nobodys(
            grad_images, image_starts, image_lengths, sample, samples, image_segments, image_segment, image_rows, width,
            ROWS, DEPTH,
        )  # fmt: skip
