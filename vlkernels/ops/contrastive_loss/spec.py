"""What the contrastive loss declares about itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.spec import Arguments, Benchmark, Case, Cost, InputMaker, OpSpec
from vlkernels.ops.contrastive_loss import functional, peers, reference
from vlkernels.ops.contrastive_loss.gpu import variants


def _features(fill: InputMaker, pairs: int, width: int, scale: float = 10.0) -> Arguments:
    """Unit rows scaled off the unit sphere: the op must not count on normalised features."""
    spread = 1.25 / width**0.5
    return {
        "image_features": fill.normal(pairs, width, scale=spread),
        "text_features": fill.normal(pairs, width, scale=spread),
        "logit_scale": (fill.normal(scale=0.0, grad=False) + scale).requires_grad_(),
    }


def _aligned(fill: InputMaker, **options: Any) -> Arguments:
    """A trained model: partners nearly equal, a loss near zero, gradients made of small differences."""
    images = fill.normal(40, 24, scale=0.25, grad=False)
    nearby = images.double() + fill.normal(40, 24, scale=0.01, grad=False)
    texts = nearby.to(torch.bfloat16).to(images.dtype)
    return {
        "image_features": images.requires_grad_(),
        "text_features": texts.requires_grad_(),
        "logit_scale": (fill.normal(scale=0.0, grad=False) + 100).requires_grad_(),
    } | options


def _keys(fill: InputMaker, pairs: int, queue: int, width: int) -> Arguments:
    spread = 1.25 / width**0.5
    return {
        "image_keys": fill.normal(pairs + queue, width, scale=spread, grad=False),
        "text_keys": fill.normal(pairs + queue, width, scale=spread, grad=False),
    }


def _aligned_keys(fill: InputMaker) -> Arguments:
    pairs = _aligned(InputMaker(fill.dtype, fill.device))
    return {
        "image_keys": pairs["image_features"].detach().clone(),
        "text_keys": pairs["text_features"].detach().clone(),
    }


def _duplicates(fill: InputMaker) -> Arguments:
    return _features(fill, 24, 16) | {"labels": fill.integers(0, 7, (24,)), "label_smoothing": 0.1}


def _momentum(fill: InputMaker, **options: Any) -> Arguments:
    return _features(fill, 12, 16) | _keys(fill, 12, 21, 16) | options


def _momentum_labels(fill: InputMaker) -> Arguments:
    return _momentum(fill, labels=fill.integers(0, 9, (33,)), label_smoothing=0.05)


def _distilled(fill: InputMaker, **options: Any) -> Arguments:
    """The scale is a number: by definition its gradient ignores the teacher, which finite differences see."""
    return _momentum(fill, distillation=0.4, logit_scale=10.0, **options)


CASES = (
    Case("pairs", lambda fill: _features(fill, 32, 24)),
    Case("peaked", lambda fill: _features(fill, 17, 8, scale=100.0)),
    Case("aligned", _aligned),
    Case("aligned_keys", lambda fill: _aligned(fill) | _aligned_keys(fill)),
    Case("single_pair", lambda fill: _features(fill, 1, 8)),
    Case("scale_vector", lambda fill: _features(fill, 9, 8) | {"logit_scale": fill.normal(1) + 5}),
    Case("scale_number", lambda fill: _features(fill, 9, 8) | {"logit_scale": 20.0}),
    Case("smoothed", lambda fill: _features(fill, 20, 12) | {"label_smoothing": 0.1}),
    Case("duplicates", _duplicates),
    Case("momentum_queue", _momentum),
    Case("momentum_labels", _momentum_labels),
    Case("distilled", _distilled),
    Case(
        "distilled_labels",
        lambda fill: _distilled(fill, labels=fill.integers(0, 9, (33,)), label_smoothing=0.05),
    ),
)


def _cost(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, **options: Any) -> Cost:
    """Each similarity once for the normalisers, once more for the gradients, and one product per gradient."""
    pairs, width = image_features.shape
    product = 2 * pairs * pairs * width
    moved = 2 * image_features.numel() * image_features.element_size()
    return Cost(
        forward_bytes=moved, backward_bytes=2 * moved, forward_flops=product, backward_flops=3 * product
    )


def _on_cpu(pairs: int, *dtypes: torch.dtype) -> Benchmark:
    return Benchmark(lambda fill: _features(fill, pairs, 512), ("cpu",), dtypes, peers=peers.DENSE, peak_memory=pairs > 4096)


def _on_card(pairs: int, width: int, beside: Mapping[str, Any]) -> Benchmark:
    return Benchmark(lambda fill: _features(fill, pairs, width), ("cuda",), (torch.bfloat16,), peers=beside)


SPECS = (
    OpSpec(
        name="contrastive_loss",
        functional=functional.contrastive_loss,
        reference=reference.contrastive_loss,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        benchmarks={
            "quickstart_n128_d64": lambda fill: _features(fill, 128, 64),
            "n4096_d512": _on_cpu(4096, torch.float32, torch.bfloat16),
            "n8192_d512": _on_cpu(8192, torch.float32),
            "n16384_d512": _on_cpu(16384, torch.float32),
            "n32768_d512": _on_card(32768, 512, peers.ALL),
            "n65536_d768": _on_card(65536, 768, peers.ALL),
            "n262144_d768": _on_card(262144, 768, peers.TILED),
        },
        peers=peers.DENSE,
        cost=_cost,
        variants=variants.variants,
    ),
)
