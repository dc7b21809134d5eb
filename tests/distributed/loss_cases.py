"""Every loss over pairs, an encoder in front, on a share of one batch: what ranks and one process compute alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vlkernels as vk
from torch import Tensor, nn

WIDTH, QUEUE = 6, 4


class Towers(nn.Module):
    """Encoders: the gradients of their parameters must come out right, not those of the features."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image, self.text = (
            nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).to(dtype)) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.tensor([1.5], dtype=dtype))
        self.bias = nn.Parameter(torch.tensor([-2.0], dtype=dtype))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = (nn.functional.normalize(x @ w, dim=1) for x, w in ((images, self.image), (texts, self.text)))
        return *features, self.scale.exp(), self.bias


@dataclass(frozen=True)
class Pairs:
    """Some of the pairs of a batch, each an image and a text as one row and as tokens."""

    images: Tensor
    texts: Tensor
    image_keys: Tensor
    text_keys: Tensor
    labels: Tensor
    image_tokens: list[Tensor]
    text_tokens: list[Tensor]
    spare: int = 0  # rows of nobody behind the tokens

    @staticmethod
    def drawn(total: int, dtype: torch.dtype = torch.float64) -> "Pairs":
        """Images of 2 to 8 tokens, texts of 1 to 5, and few labels."""
        generator = torch.Generator().manual_seed(2)
        rows = torch.randn(4, total, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(0, 4, (total,), generator=generator)
        tokens = []
        for low, high in ((2, 9), (1, 6)):
            lengths = torch.randint(low, high, (total,), generator=generator).tolist()
            drawn = [torch.randn(length, WIDTH, generator=generator, dtype=torch.float64) for length in lengths]
            tokens.append([sample.to(dtype) for sample in drawn])
        return Pairs(*rows, labels, *tokens)

    def of_rank(self, counts: Sequence[int], rank: int) -> "Pairs":
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        parts = (self.images, self.texts, self.image_keys, self.text_keys, self.labels, self.image_tokens, self.text_tokens)
        return Pairs(*(part[own] for part in parts), spare=2 * rank)

    def encoded_by(self, towers: Towers) -> tuple[tuple[list[Tensor], Tensor], tuple[list[Tensor], Tensor]]:
        """Tokens of every sample, with what the tower multiplies them by."""
        return (self.image_tokens, towers.image), (self.text_tokens, towers.text)


def over_features(loss: Callable[..., Tensor], *, biased: bool = False, scaled: bool = True, labelled: bool = False, **options):
    def call(towers: nn.Module, pairs: Pairs, **over_ranks: Any) -> Tensor:
        image, text, scale, bias = towers(pairs.images, pairs.texts)
        given = options | ({"logit_bias": bias} if biased else {}) | ({"labels": pairs.labels} if labelled else {})
        return loss(image, text, *([scale] if scaled else []), **given, **over_ranks)

    return call


def against_keys(labelled: bool, **options: Any):
    """The queue is the same everywhere."""
    generator = torch.Generator().manual_seed(3)
    queue = torch.randn(2, QUEUE, WIDTH, generator=generator, dtype=torch.float64)
    queued_labels = torch.randint(0, 4, (QUEUE,), generator=generator)

    def call(towers: nn.Module, pairs: Pairs, **over_ranks: Any) -> Tensor:
        image, text, scale, _ = towers(pairs.images, pairs.texts)
        batch = (pairs.image_keys, pairs.text_keys)
        keys = [torch.cat((own, queued.to(own.dtype))) for own, queued in zip(batch, queue, strict=True)]
        given = options | ({"labels": torch.cat((pairs.labels, queued_labels))} if labelled else {})
        return vk.contrastive_loss(image, text, scale, image_keys=keys[0], text_keys=keys[1], **given, **over_ranks)

    return call


def over_tokens(**options: Any):
    def call(towers: nn.Module, pairs: Pairs, **over_ranks: Any) -> Tensor:
        (images, image_layout), (texts, text_layout) = (
            packed(samples, pairs.spare, pairs.images) for samples in (pairs.image_tokens, pairs.text_tokens)
        )
        image, text, scale, _ = towers(images, texts)
        layouts = {"image_layout": image_layout, "text_layout": text_layout}
        return vk.late_interaction_loss(image, text, scale, **layouts, **options, **over_ranks)

    return call


def packed(samples: list[Tensor], spare: int, like: Tensor) -> tuple[Tensor, vk.SegmentLayout]:
    """The tokens of samples and their layout, with some rows of nobody."""
    layout = vk.SegmentLayout([[len(sample)] for sample in samples], capacity=sum(map(len, samples)) + spare)
    return torch.cat([*samples, like.new_ones(spare, WIDTH)]), layout


LOSSES = {
    "contrastive": over_features(vk.contrastive_loss),
    "contrastive_labels": over_features(vk.contrastive_loss, labelled=True, label_smoothing=0.1),
    "keys": against_keys(labelled=False),
    "distilled": against_keys(labelled=True, distillation=0.4, label_smoothing=0.1),
    "sigmoid": over_features(vk.sigmoid_loss, biased=True),
    "sigmoid_labels": over_features(vk.sigmoid_loss, biased=True, labelled=True),
    "hardest": over_features(vk.triplet_loss, scaled=False),
    "hardest_labels": over_features(vk.triplet_loss, scaled=False, labelled=True),
    "summed_labels": over_features(vk.triplet_loss, scaled=False, labelled=True, hardest=False),
    "filip": over_tokens(label_smoothing=0.1),
    "blip-2": over_tokens(similarity="max"),
}
WAYS = {
    "gather": {"impl": "torch"},
    "ring": {"impl": "torch", "exchange": "ring"},
    "reference": {"impl": "reference"},
    "auto": {},
}


class Model(nn.Module):
    """The towers and their loss, which DDP and ZeRO must see to know what a step uses."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.towers = Towers(dtype)

    def forward(self, name: str, pairs: Pairs, **over_ranks: Any) -> Tensor:
        return LOSSES[name](self.towers, pairs, **over_ranks)


def value_and_gradients(name: str, model: nn.Module, pairs: Pairs, **over_ranks: Any) -> tuple[Tensor, list[Tensor]]:
    """Gradients of all parameters, 0 for those that this loss does not use."""
    model.zero_grad()
    loss = model(name, pairs, **over_ranks)
    loss.backward()
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
