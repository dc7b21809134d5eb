"""What the transport distance declares about itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.spec import Arguments, Benchmark, Case, Cost, InputMaker, OpSpec, Peer
from vlkernels.ops.optimal_transport import functional, reference
from vlkernels.ops.optimal_transport.gpu import variants

IMAGES = [7, 4, 1, 0, 9, 6]
TEXTS = [3, 5, 1, 4, 0, 2]


def _sides(
    fill: InputMaker, images: list[int], texts: list[int], width: int = 24, **options: Any
) -> Arguments:
    """A tensor and a layout per side."""
    return {
        "image_tokens": fill.normal(sum(images), width),
        "text_tokens": fill.normal(sum(texts), width),
        "image_layout": fill.layout([[n] for n in images]),
        "text_layout": fill.layout([[n] for n in texts]),
    } | options


def _joint(
    fill: InputMaker, images: list[int], texts: list[int], width: int = 20, **options: Any
) -> Arguments:
    """One stream of text, images and a third segment, read in place by both sides; nobody's rows last."""
    lengths = [[text, image, 2] for text, image in zip(texts, images, strict=True)]
    layout = fill.layout(lengths, capacity=sum(map(sum, lengths)) + 5)
    hidden = fill.normal(layout.num_tokens, width)
    sides = {"image_tokens": hidden, "text_tokens": hidden, "image_layout": layout, "text_layout": layout}
    return sides | {"image_segment": 1, "text_segment": 0} | options


def _padded(fill: InputMaker) -> Arguments:
    """Padded views beside a layout whose lengths the device alone knows."""
    images = SegmentLayout.padded([4, 0, 6, 3], max_len=6).to(fill.device)
    texts = fill.layout([[2], [5], [3]]).take(fill.integers(0, 3, (4,)))
    return {
        "image_tokens": fill.normal(images.num_tokens, 18),
        "text_tokens": fill.normal(texts.num_tokens, 18),
        "image_layout": images,
        "text_layout": texts,
    }


def _aligned(fill: InputMaker) -> Arguments:
    """A trained model: words close to their regions, a plan near a matching, small distances."""
    layout = fill.layout([[6], [9], [4]])
    words = fill.normal(19, 32, grad=False)
    regions = (words.double() + fill.normal(19, 32, scale=0.1, grad=False)).to(torch.bfloat16).to(words.dtype)
    sides = {"image_tokens": regions.requires_grad_(), "text_tokens": words.requires_grad_()}
    return sides | {"image_layout": layout, "text_layout": layout}


def _opposite(fill: InputMaker) -> Arguments:
    """Every word has a region equal to it and one opposite: the plan underflows where it carries nothing."""
    words = fill.normal(8, 16, grad=False)
    regions = torch.cat((-words, words)).requires_grad_()
    layouts = {"image_layout": fill.layout([[16]]), "text_layout": fill.layout([[8]])}
    return {"image_tokens": regions, "text_tokens": words.requires_grad_(), **layouts}


def _small_norms(fill: InputMaker) -> Arguments:
    """Norms on both sides of 1e-5, zero among them: integers times powers of two, exact in every dtype."""
    sizes = torch.tensor([0.0, 2.0**-20, 2.0**-22, 1.0, 2.0**6], device=fill.device)[:, None]
    layout = fill.layout([[5]])
    images, texts = ((fill.integers(-3, 4, (5, 9)) * sizes).to(fill.dtype).requires_grad_() for _ in range(2))
    return {"image_tokens": images, "text_tokens": texts, "image_layout": layout, "text_layout": layout}


CASES = (
    Case("ragged, empty sides", lambda fill: _sides(fill, IMAGES, TEXTS)),
    Case("joint stream, capacity", lambda fill: _joint(fill, IMAGES, TEXTS)),
    Case("padded, taken", _padded),
    Case("few steps, beta 1", lambda fill: _sides(fill, [5, 17], [16, 3], beta=1.0, iterations=3)),
    Case("steep, many steps", lambda fill: _sides(fill, [12, 5], [7, 9], beta=0.1, iterations=80)),
    Case("one step", lambda fill: _sides(fill, [6, 2], [3, 4], iterations=1)),
    Case("long", lambda fill: _sides(fill, [70, 2], [33, 65], width=40)),
    Case("aligned", _aligned),
    Case("opposite", _opposite),
    Case("small norms", _small_norms),
    Case("no sample", lambda fill: _sides(fill, [], [])),
)


def _hold_plans(image_tokens: Tensor, text_tokens: Tensor, **options: Any) -> Callable[..., Tensor]:
    """The distance with the plans of these tokens: its derivative is the gradient that the op defines."""
    steps = {name: options.pop(name) for name in ("beta", "iterations") if name in options}
    costs = reference.cosine_costs(image_tokens, text_tokens, **options)
    plans = reference.transport_plans(costs.detach(), **options, **steps)

    def distance(image_tokens: Tensor, text_tokens: Tensor, **_: Any) -> Tensor:
        return (plans * reference.cosine_costs(image_tokens, text_tokens, **options)).sum((1, 2))

    return distance


def _uniter_like(fill: InputMaker) -> Arguments:
    """A batch of UNITER's: captions and the regions of their images in one stream."""
    images, texts = (fill.counts(low, high, (64,)).tolist() for low, high in ((10, 101), (10, 21)))
    return _joint(fill, images, texts, width=768)


def _vilt_like(fill: InputMaker) -> Arguments:
    """A batch of ViLT's: captions and the patches of their images in one stream."""
    images, texts = (fill.counts(low, high, (64,)).tolist() for low, high in ((120, 241), (10, 41)))
    return _joint(fill, images, texts, width=768)


def _cost(image_tokens: Tensor, text_tokens: Tensor, image_layout: SegmentLayout, **options: Any) -> Cost:
    """Every token read, every gradient written; three products, and five operations per pair and step."""
    images = image_layout.lengths[:, options.get("image_segment", 0)].long()
    texts = options["text_layout"].lengths[:, options.get("text_segment", 0)].long()
    pairs, width = int((images * texts).sum()), image_tokens.shape[1]
    moved = int((images + texts).sum()) * width * image_tokens.element_size()
    steps = 5 * options.get("iterations", 50)
    return Cost(
        forward_bytes=moved,
        backward_bytes=2 * moved,
        forward_flops=pairs * (2 * width + steps),
        backward_flops=4 * pairs * width,
    )


def _prepare_eager(
    image_tokens: Tensor, text_tokens: Tensor, **options: Any
) -> tuple[Callable[[], Any], list[Tensor]]:
    """UNITER's way, on samples that are padded, and masks that are made, before the clock starts."""
    with torch.no_grad():
        images, texts = (
            reference.padded_rows(tokens, options[f"{side}_layout"], options.get(f"{side}_segment", 0))
            for side, tokens in (("image", image_tokens), ("text", text_tokens))
        )
    n, m = (
        options[f"{side}_layout"].lengths[:, options.get(f"{side}_segment", 0)] for side in ("image", "text")
    )
    pads = [torch.arange(x.shape[1], device=n.device) >= c[:, None] for x, c in ((images, n), (texts, m))]
    inputs = [images.requires_grad_(), texts.requires_grad_()]
    return lambda: _eager(*inputs, *pads, n.float(), m.float()), inputs


def _eager(
    images: Tensor, texts: Tensor, image_pad: Tensor, text_pad: Tensor, n: Tensor, m: Tensor
) -> Tensor:
    unit_images, unit_texts = (F.normalize(x.float(), dim=2, eps=1e-5) for x in (images, texts))
    pad = text_pad[:, :, None] | image_pad[:, None, :]
    costs = (1 - unit_texts @ unit_images.transpose(1, 2)).masked_fill(pad, 0)
    with torch.no_grad():
        kernel = torch.exp(-costs / 0.5).masked_fill(pad, 0).transpose(1, 2)
        plan = torch.ones_like(kernel).masked_fill(pad.transpose(1, 2), 0)
        sigma = (1 / m)[:, None, None].expand(-1, texts.shape[1], 1).masked_fill(text_pad[:, :, None], 0)
        image_far, text_far = 1e4 * image_pad[:, :, None], 1e4 * text_pad[:, None, :]
        for _ in range(50):
            weighted = kernel * plan
            delta = 1 / (n[:, None, None] * (weighted @ sigma) + image_far)
            sigma = (1 / (m[:, None, None] * (delta.transpose(1, 2) @ weighted) + text_far)).transpose(1, 2)
            plan = delta * weighted * sigma.transpose(1, 2)
        plan = plan.masked_fill(pad.transpose(1, 2), 0)
    return (costs @ plan).diagonal(dim1=1, dim2=2).sum(1)


PEERS = {"eager, padded": Peer(_prepare_eager)}
TIMED = (torch.float32, torch.bfloat16)


def _pairs_of_forty(fill: InputMaker) -> Arguments:
    return _joint(fill, [40] * 256, [40] * 256, width=768)


SPECS = (
    OpSpec(
        name="optimal_transport",
        functional=functional.optimal_transport,
        reference=reference.optimal_transport,
        implementations=functional.IMPLEMENTATIONS,
        cases=CASES,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        held=_hold_plans,
        benchmarks={
            "b64 text 10-20 regions 10-100": Benchmark(_uniter_like, dtypes=TIMED, peers=PEERS),
            "b256 text 40 regions 40": Benchmark(_pairs_of_forty, dtypes=TIMED, peers=PEERS),
            "b64 text 10-40 patches 120-240": Benchmark(_vilt_like, ("cuda",), TIMED, PEERS),
        },
        peers=PEERS,
        cost=_cost,
        variants=variants.variants,
    ),
)
