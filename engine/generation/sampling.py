"""One continuation per sample: the likeliest token, or one drawn from the nucleus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.generation.decoding import Decoder, Decoding
from engine.models.transformer import Source, Tokens
from engine.sections import require

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""Ids `[n]` by their logits `[n, V]`, the samples `[n]` they belong to, and how many samples there are."""


@dataclass(frozen=True)
class Generated:
    """What was decoded behind every prompt."""

    ids: Tensor
    """int64 [B, L]: with the end token where one came, `pad` behind it."""
    lengths: Tensor
    """int64 [B]: how many of them, the end token counted."""
    scores: Tensor | None = None
    """float32 [B]: of beam search, what it chose by."""


def greedy(logits: Tensor, samples: Tensor, of: int) -> Tensor:
    """The likeliest token."""
    return logits.argmax(dim=-1)


@dataclass(frozen=True)
class Nucleus:
    """A draw from the smallest set of likeliest tokens that holds `share` of the probability (Holtzman et al., 2020)."""

    generator: torch.Generator
    share: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, f"share must be in (0, 1], got {self.share}")
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")

    def __call__(self, logits: Tensor, samples: Tensor, of: int) -> Tensor:
        # Every sample has its draw in every step, so that none depends on when the others end.
        drawn = torch.rand(of, generator=self.generator, device=self.generator.device).to(logits.device)[samples]
        probabilities, order = (logits.float() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        cumulative = probabilities.cumsum(-1)
        kept = (cumulative - probabilities < self.share).sum(-1, keepdim=True)
        aim = drawn[:, None] * cumulative.gather(1, kept - 1)
        place = torch.searchsorted(cumulative, aim, right=True).minimum(kept - 1)
        return order.gather(1, place).squeeze(1)


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompt: Tokens,
    *,
    end: int,
    pad: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    choose: Choose = greedy,
    source: Source | None = None,
) -> Generated:
    """Go on from every prompt until its end token.

    A pass computes the samples that have not ended. The host waits once per token, for how many these are.
    """
    decoding, count = Decoding(decoder, prompt, source, max_new_tokens), prompt.layout.num_samples
    logits, samples = decoding.start(), torch.arange(count, device=prompt.hidden.device)
    ids = torch.full((count, max_new_tokens), pad, device=logits.device)
    lengths = torch.zeros(count, dtype=torch.int64, device=logits.device)
    for place in range(max_new_tokens):
        if place < min_new_tokens:
            logits[:, end] = -torch.inf
        chosen = choose(logits, samples, count)
        ids[samples, place], lengths[samples] = chosen, place + 1
        chosen, samples = continuing(chosen != end, chosen, samples)
        if place + 1 == max_new_tokens or not len(samples):
            break
        logits = decoding.step(chosen, samples)
    return Generated(ids, lengths)


def continuing(going: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """The rows that go on; the host waits for how many these are, and for nothing else."""
    left = int(going.sum())
    if left == len(going):
        return rows
    kept = torch.nonzero_static(going, size=left).flatten()
    return tuple(row[kept] for row in rows)
