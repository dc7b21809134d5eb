"""What the late-interaction loss declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.spec import Arguments, Benchmark, Case, Cost, InputMaker, OpSpec, Peer, Variant
from vlkernels.core.peers import rival
from vlkernels.ops.late_interaction_loss import functional, peers, reference


def _scale(fill: InputMaker, value: float) -> Tensor:
    return (fill.normal(scale=0.0, grad=False) + value).requires_grad_()


def _sides(
    fill: InputMaker,
    images: list[int],
    texts: list[int],
    width: int,
    scale: float = 10.0,
    norm: float = 1.25,
    **options: Any,
) -> Arguments:
    """A layout per side; tokens scaled off the unit sphere: the op must not count on normalised ones."""
    return {
        "image_tokens": fill.normal(sum(images), width, scale=norm / width**0.5),
        "text_tokens": fill.normal(sum(texts), width, scale=norm / width**0.5),
        "logit_scale": _scale(fill, scale),
        "image_layout": fill.layout([[n] for n in images]),
        "text_layout": fill.layout([[n] for n in texts]),
    } | options


def _ragged(fill: InputMaker, pairs: int, width: int, images: int, texts: int, **options: Any) -> Arguments:
    """So many pairs of 1 to ``images`` and 1 to ``texts`` tokens."""
    lengths = (fill.counts(1, longest + 1, (pairs,)).tolist() for longest in (images, texts))
    return _sides(fill, *lengths, width, **options)


def _aligned(fill: InputMaker, **options: Any) -> Arguments:
    """A trained model: every word equals a patch but for little, a loss near zero, gradients of small differences."""
    lengths = [5, 2, 9, 1, 4, 7, 3, 6]
    patches = fill.normal(sum(lengths), 24, scale=0.25, grad=False)
    words = patches.double() + fill.normal(sum(lengths), 24, scale=0.01, grad=False)
    layout = fill.layout([[n] for n in lengths])
    return {
        "image_tokens": patches.requires_grad_(),
        "text_tokens": words.to(torch.bfloat16).to(patches.dtype).requires_grad_(),
        "logit_scale": _scale(fill, 100.0),
        "image_layout": layout,
        "text_layout": layout,
    } | options


def _duplicates(fill: InputMaker, **options: Any) -> Arguments:
    """Equal images and equal texts in one batch: equal similarities, the largest one of a row several times."""
    images, texts = fill.normal(6, 8, scale=0.4, grad=False), fill.normal(4, 8, scale=0.4, grad=False)
    return {
        "image_tokens": images.repeat(3, 1).requires_grad_(),
        "text_tokens": texts.repeat(3, 1).requires_grad_(),
        "logit_scale": _scale(fill, 10.0),
        "image_layout": fill.layout([[2], [4]] * 3),
        "text_layout": fill.layout([[3], [1]] * 3),
    } | options


def _in_segments(fill: InputMaker, **options: Any) -> Arguments:
    """Samples of several segments, one of them sometimes empty, and nobody's rows, beside padded texts."""
    images = fill.layout([[1, 3, 0], [0, 0, 2], [4, 0, 1], [2, 2, 2]], capacity=22)
    texts = SegmentLayout.padded([4, 1, 6, 3], max_len=6).to(fill.device)
    return {
        "image_tokens": fill.normal(images.num_tokens, 16, scale=0.3),
        "text_tokens": fill.normal(texts.num_tokens, 16, scale=0.3),
        "logit_scale": fill.normal(1) + 5,
        "image_layout": images,
        "text_layout": texts,
    } | options


def _taken(fill: InputMaker) -> Arguments:
    """Lengths that the device alone knows; the host has bounds."""
    images, texts = (fill.layout(rows).take(fill.integers(0, 3, (5,))) for rows in ([[2], [5], [3]], [[4], [1], [2]]))
    return {
        "image_tokens": fill.normal(images.num_tokens, 12, scale=0.3),
        "text_tokens": fill.normal(texts.num_tokens, 12, scale=0.3),
        "logit_scale": 20.0,
        "image_layout": images,
        "text_layout": texts,
    }


def _queries(fill: InputMaker, pairs: int = 20, queries: int = 8, width: int = 16) -> Arguments:
    """BLIP-2's contrastive loss: as many queries for every image, one token for every text."""
    return _sides(fill, [queries] * pairs, [1] * pairs, width, similarity="max", label_smoothing=0.1)


def _captioned(fill: InputMaker, pairs: int, patches: int, width: int) -> Arguments:
    """As many patches for every image, captions of 5 to 32 tokens."""
    return _sides(fill, [patches] * pairs, fill.counts(5, 33, (pairs,)).tolist(), width)


CASES = (
    Case("pairs", lambda fill: _ragged(fill, 16, 24, images=9, texts=6)),
    Case("one pair", lambda fill: _ragged(fill, 1, 8, images=5, texts=4)),
    Case("two pairs", lambda fill: _ragged(fill, 2, 8, images=7, texts=5, scale=1.0)),
    Case("63 pairs", lambda fill: _ragged(fill, 63, 64, images=6, texts=4)),
    Case("65 pairs, any two", lambda fill: _ragged(fill, 65, 8, images=4, texts=5, similarity="max")),
    Case("257 pairs, wide", lambda fill: _ragged(fill, 257, 256, images=4, texts=3, scale=100.0)),
    Case("one token each", lambda fill: _sides(fill, [1] * 12, [1] * 12, 16)),
    Case("long samples", lambda fill: _sides(fill, [300, 2, 70], [33, 290, 1], 16)),
    Case("peaked", lambda fill: _ragged(fill, 17, 8, images=5, texts=6, scale=100.0)),
    Case("extreme", lambda fill: _ragged(fill, 9, 8, images=5, texts=6, scale=3e4, norm=50.0)),
    Case("aligned", _aligned),
    Case("aligned, any two", lambda fill: _aligned(fill, similarity="max")),
    Case("duplicates", _duplicates),
    Case("duplicates, any two", lambda fill: _duplicates(fill, similarity="max")),
    Case("segments, padded", _in_segments),
    Case("segments, padded, any two", lambda fill: _in_segments(fill, similarity="max", label_smoothing=0.2)),
    Case("taken, scale a number", _taken),
    Case("smoothed", lambda fill: _ragged(fill, 20, 12, images=6, texts=6, label_smoothing=0.1)),
    Case("queries", _queries),
    Case("salient tokens", lambda fill: _ragged(fill, 20, 12, images=9, texts=6, token_share=0.4)),
    Case("salient tokens, segments, padded", lambda fill: _in_segments(fill, token_share=0.3, logit_scale=_scale(fill, 8.0))),
)


def _cost(image_tokens: Tensor, text_tokens: Tensor, logit_scale: Tensor | float, **options: Any) -> Cost:
    """Each product of tokens once; gradients gather and scatter one row for every maximum."""
    images, texts = (options[f"{side}_layout"].lengths for side in ("image", "text"))
    pairs, width = len(images), image_tokens.shape[1]
    tokens = int(images.sum()) * int(texts.sum())
    maxima = pairs * (int(images.sum()) + int(texts.sum()))
    if options.get("similarity") == "max":
        maxima = pairs * pairs
    moved = (image_tokens.numel() + text_tokens.numel()) * image_tokens.element_size()
    return Cost(
        forward_bytes=moved,
        backward_bytes=2 * moved,
        forward_flops=2 * tokens * width,
        backward_flops=4 * maxima * width,
    )


def _variants(architecture: int) -> Iterable[Variant]:
    from vlkernels.ops.late_interaction_loss.gpu import variants

    return variants.variants(architecture)


TIMED = (torch.float32, torch.bfloat16)  # the dense loss in float16 takes minutes on a CPU
DENSE = {"dense": Peer(peers.dense)}
PACKED = DENSE | {
    "late-interaction-kernels, two calls": rival(
        peers.two_calls(peers.late_interaction_kernels), functional.late_interaction_loss
    ),
}
EQUAL = PACKED | {"flash-maxsim, two calls": rival(peers.two_calls(peers.flash_maxsim), functional.late_interaction_loss)}


def benchmarks(shrink: int = 1) -> dict[str, Benchmark]:
    """``shrink`` divides the numbers of pairs, for tests."""

    def equal(pairs: int) -> Callable[[InputMaker], Arguments]:
        return lambda fill: _sides(fill, [49] * (pairs // shrink), [32] * (pairs // shrink), 256)

    def captioned(pairs: int) -> Callable[[InputMaker], Arguments]:
        return lambda fill: _captioned(fill, pairs // shrink, 49, 256)

    def queries(pairs: int) -> Callable[[InputMaker], Arguments]:
        return lambda fill: _queries(fill, pairs // shrink, 32, 256)

    return {
        **{
            f"filip n{pairs} p49 t5-32 d256": Benchmark(captioned(pairs), ("cpu",), TIMED[:1], PACKED, peak_memory=True)
            for pairs in (64, 128)
        },
        **{
            f"filip n{pairs} p49 t32 d256": Benchmark(equal(pairs), ("cuda",), (torch.bfloat16,), EQUAL)
            for pairs in (256, 512, 2048)
        },
        "filip n256 p49 t5-32 d256": Benchmark(captioned(256), dtypes=TIMED, peers=PACKED, peak_memory=True),
        "blip-2 n512 q32 d256": Benchmark(queries(512), dtypes=TIMED, peers=DENSE),
        "blip-2 n4096 q32 d256": Benchmark(queries(4096), ("cuda",), (torch.bfloat16,), DENSE),
    }


SPECS = (
    OpSpec(
        name="late_interaction_loss",
        functional=functional.late_interaction_loss,
        reference=reference.late_interaction_loss,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        benchmarks=benchmarks(),
        peers=DENSE,
        cost=_cost,
        variants=_variants,
    ),
)
