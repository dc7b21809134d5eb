"""What a system is to the runner: lengths as its papers' data have them, samples, batches, and models with equal weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.uniter_pairs import random_batches, token_bucket_batches
from engine.sections import Stack

POOL = 8192
PACKED, PADDED, HUGGING_FACE = "packed", "padded PyTorch", "transformers"


class Moving(Protocol):
    """A batch: see `engine.batch.OnDevice`."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any: ...


class System(ABC):
    """One architecture at one size.

    A model of it maps a batch to the loss, a scalar: the packed one reads `packed` batches, its peers `padded` ones.
    """

    name: str
    layers: str
    """How deep, and of how deep a published model."""
    lengths_are: str
    """Where the lengths come from: an assumption, stated beside every result."""
    pairs: int
    """Samples of a random batch."""
    token_budget: int | None = None
    """Padded tokens of a bucketed batch (UNITER's sampler); without it bucketed batches have `pairs` samples, too."""

    @abstractmethod
    def lengths(self, samples: int, random: np.random.Generator) -> Tensor:
        """int64 `[samples, 2]`: tokens of each text and image."""

    @abstractmethod
    def sample(self, lengths: Sequence[int], random: np.random.Generator) -> Any:
        """Values without meaning, shapes and masks as in pretraining."""

    @abstractmethod
    def packed(self, samples: Sequence[Any]) -> Moving: ...

    @abstractmethod
    def padded(self, samples: Sequence[Any]) -> Moving: ...

    @abstractmethod
    def model(self) -> nn.Module:
        """Ours, with weights from torch's generator."""

    @abstractmethod
    def peer(self, name: str, ours: nn.Module) -> nn.Module:
        """`PADDED` or `HUGGING_FACE`, with the weights of ours. `ImportError` or `ValueError` say why it is not here."""

    @abstractmethod
    def flops(self, batch: Any) -> float:
        """Of a step on a packed batch: three times the products of the forward, every layer over every true token,
        also where a model computes the last one for the rows that are read alone, as the packed ones do."""

    @abstractmethod
    def tokens(self, batch: Any) -> tuple[int, int]:
        """True tokens of a packed batch that the transformers read, and samples."""

    @abstractmethod
    def padded_tokens(self, batch: Any) -> int:
        """The same of a padded one, with its padding."""

    def agreeing(self, ours: nn.Module, batch: Any) -> dict[str, Any]:
        """Options of the peers' forward under which the losses must be ours: choices that each draws for itself."""
        return {}

    def batches(self, random: np.random.Generator) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Lengths of a pool of samples, and batches of each kind from it."""
        lengths = self.lengths(POOL, random)
        total = lengths.sum(1)
        if self.token_budget is None:
            in_order = total.argsort(stable=True)
            bucketed = [in_order[index] for index in torch.arange(POOL).split(self.pairs) if len(index) == self.pairs]
        else:
            bucketed = token_bucket_batches(total, self.token_budget, random)
        return lengths, {"random": random_batches(POOL, self.pairs, random), "bucketed": bucketed}


def spread(batches: Sequence[Tensor], lengths: Tensor, count: int) -> list[Tensor]:
    """`count` of the batches, at even quantiles of their numbers of tokens."""
    by_tokens = sorted(batches, key=lambda index: int(lengths[index].sum()))
    return [by_tokens[(2 * i + 1) * len(by_tokens) // (2 * count)] for i in range(count)]


def long_tailed(samples: int, median: float, sigma: float, most: int, random: np.random.Generator) -> np.ndarray:
    """Log-normal numbers of words, at least 1."""
    return np.clip(np.rint(random.lognormal(np.log(median), sigma, samples)), 1, most).astype(np.int64)


@dataclass(frozen=True)
class Products:
    """Operations of the matrix products of a forward."""

    stack: Stack

    def __call__(self, lengths: Tensor, causal: bool = False) -> float:
        """Self-attention and feed-forward of all layers over samples of these lengths."""
        tokens, squares, width = int(lengths.sum()), int(lengths.square().sum()), self.stack.width
        attended = 4 * width * squares / (2 if causal else 1)
        return self.stack.layers * (tokens * width * (8 * width + 4 * self.stack.mlp_width) + attended)

    def cross(self, lengths: Tensor, source: Tensor) -> float:
        """Queries, outputs and products of cross-attention in all layers; not the source's keys and values."""
        width = self.stack.width
        return self.stack.layers * (4 * width**2 * int(lengths.sum()) + 4 * width * int((lengths * source).sum()))


@torch.no_grad()
def redraw(module: nn.Module, alpha: float = 0.05) -> nn.Module:
    """Move vectors off their initial 0 and 1, which hide a lost bias or a swapped norm from the comparison of losses."""
    for parameter in module.parameters():
        if parameter.dim() == 1 and parameter.numel() > 1:
            parameter.add_(torch.randn_like(parameter), alpha=alpha)
    return module


def load(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """All of the module's parameters, and no other ones."""
    own = dict(module.named_parameters())
    assert own.keys() == weights.keys(), f"without a weight or a place: {sorted(own.keys() ^ weights.keys())[:4]}"
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name].view_as(parameter))
    return module
