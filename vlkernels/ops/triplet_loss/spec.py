"""What the triplet loss declares about itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlkernels.core.spec import Arguments, Benchmark, Case, Cost, InputMaker, OpSpec
from vlkernels.ops.triplet_loss import functional, reference
from vlkernels.ops.triplet_loss.gpu import variants


def features(fill: InputMaker, count: int, width: int, **options: Any) -> Arguments:
    """Unit rows scaled off the unit sphere: the op must not count on normalised features."""
    spread = 1.25 / width**0.5
    made = {name: fill.normal(count, width, scale=spread) for name in ("image_features", "text_features")}
    return made | options


def _labelled(fill: InputMaker, **options: Any) -> Arguments:
    return features(fill, 24, 16, labels=fill.integers(0, 7, (24,))) | options


CASES = (
    Case("hardest", lambda fill: features(fill, 32, 24)),
    Case("summed", lambda fill: features(fill, 19, 24, hardest=False)),
    Case("margin", lambda fill: features(fill, 17, 8, margin=1.5)),
    Case("no_margin", lambda fill: features(fill, 17, 8, margin=0.0, hardest=False)),
    Case("labels", _labelled),
    Case("labels_summed", lambda fill: _labelled(fill, hardest=False)),
    Case("single_pair", lambda fill: features(fill, 1, 8)),
    Case("one_label", lambda fill: features(fill, 5, 8, labels=fill.integers(3, 4, (5,)))),
)


def _cost(image_features: Tensor, text_features: Tensor, margin: float = 0.2, hardest: bool = True, **_: Any) -> Cost:
    """Each similarity once; the gradient of one negative per row is O(N D), that of all is two products."""
    count, width = image_features.shape
    product = 2 * count * count * width
    moved = 2 * image_features.numel() * image_features.element_size()
    backward = 0 if hardest else 2 * product
    return Cost(forward_bytes=moved, backward_bytes=2 * moved, forward_flops=product, backward_flops=backward)


def _dense(image_features: Tensor, text_features: Tensor, margin: float = 0.2, hardest: bool = True) -> Tensor:
    """Plain PyTorch as VSE++ writes it, with the whole matrix of hinges."""
    scores = image_features @ text_features.T
    partners = scores.diagonal()[:, None]
    itself = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    of_images = (margin + scores - partners).clamp(min=0).masked_fill(itself, 0)
    of_texts = (margin + scores - partners.T).clamp(min=0).masked_fill(itself, 0)
    if hardest:
        return of_images.max(1)[0].sum() + of_texts.max(0)[0].sum()
    return of_images.sum() + of_texts.sum()


PEERS = {"torch": _dense}


def _on_cpu(hardest: bool) -> Benchmark:
    return Benchmark(lambda fill: features(fill, 4096, 512, hardest=hardest), ("cpu",), peers=PEERS)


SPECS = (
    OpSpec(
        name="triplet_loss",
        functional=functional.triplet_loss,
        reference=reference.triplet_loss,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        benchmarks={
            "hardest_n128_d1024": lambda fill: features(fill, 128, 1024),
            "hardest_n4096_d512": _on_cpu(hardest=True),
            "summed_n4096_d512": _on_cpu(hardest=False),
            "hardest_n32768_d1024": Benchmark(lambda fill: features(fill, 32768, 1024), ("cuda",), (torch.bfloat16,)),
        },
        peers=PEERS,
        cost=_cost,
        variants=variants.variants,
    ),
)
