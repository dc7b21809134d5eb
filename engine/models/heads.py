"""Heads: what turns hidden states into features, scores and losses."""

from __future__ import annotations

from typing import Any

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.transformer import ACTIVATIONS


class HeadTransform(nn.Module):
    """BERT's: linear map, activation, LayerNorm."""

    def __init__(self, width: int, out_width: int, activation: str, eps: float, impl: str):
        super().__init__()
        self.transform = nn.Linear(width, out_width)
        self.activation = ACTIVATIONS[activation]
        self.norm = vk.FusedLayerNorm(out_width, eps)
        self.impl = impl

    def forward(self, hidden: Tensor) -> Tensor:
        """What a decoder reads."""
        return self.norm(self.activation(self.transform(hidden)), impl=self.impl)


class MaskedLanguageHead(HeadTransform):
    """The transform, then the word table as decoder with a bias per word."""

    def __init__(self, width: int, table_width: int, vocab_size: int, activation: str, eps: float, impl: str):
        super().__init__(width, table_width, activation, eps, impl)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def loss(self, hidden: Tensor, targets: Tensor, table: Tensor, label_smoothing: float = 0.0, **teacher: Any) -> Tensor:
        """Sum of the cross-entropies, in nats; the logits `[M, V]` are never stored. `teacher` and its share,
        `distillation`, are as of `vk.linear_cross_entropy`."""
        options = {"label_smoothing": label_smoothing, "reduction": "sum", "impl": self.impl, **teacher}
        return vk.linear_cross_entropy(self(hidden), table, targets, bias=self.bias, **options)

    def logits(self, hidden: Tensor, table: Tensor) -> Tensor:
        return F.linear(self(hidden), table, self.bias)
