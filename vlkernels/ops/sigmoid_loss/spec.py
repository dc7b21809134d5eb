"""What the sigmoid loss declares about itself."""

from __future__ import annotations

import torch
from torch import Tensor

from vlkernels.core.peers import compiled, loaded, rival
from vlkernels.core.spec import Arguments, Benchmark, Case, Cost, InputMaker, OpSpec
from vlkernels.ops.sigmoid_loss import functional, peers, reference
from vlkernels.ops.sigmoid_loss.gpu import variants


def features(fill: InputMaker, count: int, width: int, scale: float = 10.0, bias: float = -10.0) -> Arguments:
    """Unit rows scaled off the unit sphere: the op must not count on normalised features."""
    spread = 1.25 / width**0.5
    return {
        "image_features": fill.normal(count, width, scale=spread),
        "text_features": fill.normal(count, width, scale=spread),
        "logit_scale": _number(fill, scale),
        "logit_bias": _number(fill, bias),
    }


def _number(fill: InputMaker, value: float) -> Tensor:
    """A parameter in float32, whatever the features are: the master copy of mixed precision."""
    return (fill.normal(scale=0.0, grad=False, dtype=torch.float32) + value).requires_grad_()


def _aligned(fill: InputMaker) -> Arguments:
    """A trained model: partners nearly equal and others far, a loss near zero."""
    near = features(fill, 40, 24, scale=100.0, bias=-50.0)
    images = near["image_features"].detach()
    texts = (images.double() + fill.normal(40, 24, scale=0.01, grad=False)).to(torch.bfloat16).to(images.dtype)
    return near | {"text_features": texts.requires_grad_()}


def _duplicates(fill: InputMaker) -> Arguments:
    """Equal rows, once with equal labels and once without."""
    rows = features(fill, 24, 16)
    again = torch.arange(24) % 17
    for name in ("image_features", "text_features"):
        rows[name] = rows[name].detach()[again.to(fill.device)].requires_grad_()
    return rows


CASES = (
    Case("pairs", lambda fill: features(fill, 32, 24)),
    Case("peaked", lambda fill: features(fill, 17, 8, scale=100.0, bias=0.0)),
    Case("extreme", lambda fill: features(fill, 13, 8, scale=1e4, bias=1e3)),
    Case("aligned", _aligned),
    Case("single_pair", lambda fill: features(fill, 1, 8)),
    Case("vectors", lambda fill: features(fill, 9, 8) | {n: fill.normal(1) for n in ("logit_scale", "logit_bias")}),
    Case("numbers", lambda fill: features(fill, 9, 8) | {"logit_scale": 20.0, "logit_bias": -2.5}),
    Case("scale_of_zero", lambda fill: features(fill, 9, 8, scale=0.0)),
    Case("labels", lambda fill: features(fill, 24, 16, bias=-2.0) | {"labels": fill.integers(0, 7, (24,))}),
    Case("duplicates", _duplicates),
)


def _cost(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, **options: object) -> Cost:
    """Each similarity once and one product per gradient."""
    count, width = image_features.shape
    product = 2 * count * count * width
    moved = 2 * image_features.numel() * image_features.element_size()
    return Cost(forward_bytes=moved, backward_bytes=2 * moved, forward_flops=product, backward_flops=2 * product)


PEERS = {"torch": peers.eager}
ON_A_CARD = {
    "torch": peers.eager,
    "torch.compile": rival(compiled(loaded(lambda: peers.eager)), functional.sigmoid_loss),
    "open_clip SigLipLoss": rival(loaded(peers.open_clip), functional.sigmoid_loss),
    "siglip-kernel": rival(loaded(peers.siglip_kernel), functional.sigmoid_loss),
}


def _on_cpu(count: int) -> Benchmark:
    return Benchmark(lambda fill: features(fill, count, 512), ("cpu",), (torch.float32,), PEERS, peak_memory=True)


def _on_a_card(count: int, width: int) -> Benchmark:
    return Benchmark(lambda fill: features(fill, count, width), ("cuda",), (torch.bfloat16,), ON_A_CARD)


SPECS = (
    OpSpec(
        name="sigmoid_loss",
        functional=functional.sigmoid_loss,
        reference=reference.sigmoid_loss,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        benchmarks={
            "quickstart_n128_d64": lambda fill: features(fill, 128, 64),
            "n8192_d512": _on_cpu(8192),
            "n16384_d512": _on_cpu(16384),
            **{f"n{count}_d{width}": _on_a_card(count, width) for count, width in ((16384, 768), (65536, 768), (32768, 512))},
        },
        peers=PEERS,
        cost=_cost,
        variants=variants.variants,
    ),
)
