"""What the drawing of hard negatives declares about itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlkernels.core.spec import Arguments, Case, Cost, InputMaker, OpSpec
from vlkernels.ops.hard_negatives import functional, reference
from vlkernels.ops.hard_negatives.gpu import variants


def _features(fill: InputMaker, pairs: int, width: int, scale: float = 5.0, **options: Any) -> Arguments:
    spread = 1.25 / width**0.5
    return {
        "image_features": fill.normal(pairs, width, scale=spread, grad=False),
        "text_features": fill.normal(pairs, width, scale=spread, grad=False),
        "logit_scale": scale,
        "rng": fill.rng(),
    } | options


CASES = (
    Case("pairs", lambda fill: _features(fill, 70, 24, stream=3)),
    Case("peaked", lambda fill: _features(fill, 33, 8, scale=100.0)),
    Case("labels", lambda fill: _features(fill, 40, 16, labels=fill.integers(0, 5, (40,)))),
    Case("labels_all_equal", lambda fill: _features(fill, 9, 8, labels=fill.integers(4, 5, (9,)))),
    Case("sample_ids", lambda fill: _features(fill, 30, 8, sample_ids=fill.integers(0, 1000, (30,)))),
    Case("scale_tensor", lambda fill: _features(fill, 20, 8) | {"logit_scale": fill.normal(1, grad=False)}),
    Case("single_pair", lambda fill: _features(fill, 1, 8)),
)


def _cost(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, **options: Any) -> Cost:
    pairs, width = image_features.shape
    return Cost(
        forward_bytes=2 * image_features.numel() * image_features.element_size() + 16 * pairs,
        forward_flops=2 * pairs * pairs * width,
    )


SPECS = (
    OpSpec(
        name="hard_negatives",
        functional=functional.hard_negatives,
        reference=reference.hard_negatives,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        benchmarks={
            "n4096_d256": lambda fill: _features(fill, 4096, 256),
        },
        cost=_cost,
        variants=variants.variants,
    ),
)
