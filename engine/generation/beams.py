"""Beam search, with the rules of `transformers`: when a continuation counts as found, and when none can improve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.generation.decoding import Decoder, Decoding
from engine.generation.sampling import Generated, continuing
from engine.models.transformer import Source, Tokens

HOPELESS = -1e9


@dataclass
class Search:
    """Of n samples that go on, K continuations each, best first, and the best K that have ended."""

    samples: Tensor
    """int64 [n]."""
    scores: Tensor
    """float32 [n, K]: log-probabilities."""
    ids: Tensor
    """int64 [n, K, L]."""
    ended_scores: Tensor
    """float32 [n, K]: log-probabilities over length ** penalty."""
    ended_ids: Tensor
    """int64 [n, K, L]."""
    ended_lengths: Tensor
    """int64 [n, K]; 0: none has ended yet."""

    @classmethod
    def begin(cls, samples: int, beams: int, most: int, pad: int, device: torch.device) -> Search:
        """Continuations begin alike, so that at first only one of each sample counts."""
        scores = torch.full((samples, beams), HOPELESS, device=device)
        ended, lengths = scores.clone(), torch.zeros(samples, beams, dtype=torch.int64, device=device)
        scores[:, 0] = 0
        ids = torch.full((samples, beams, most), pad, device=device)
        return cls(torch.arange(samples, device=device), scores, ids, ended, ids.clone(), lengths)

    def advance(self, logits: Tensor, place: int, end: int, penalty: float) -> Tensor:
        """Choose the tokens at `place` by logits `[n, K, V]`; int64 `[n, K]`: the continuations that the new ones go on from."""
        beams, most = self.scores.shape[1], self.ids.shape[2]
        totals = logits.float().log_softmax(-1) + self.scores[:, :, None]
        # Twice as many as go on: the best half may end here.
        scores, found = totals.flatten(1).topk(2 * beams)
        parents, tokens = found // logits.shape[2], found % logits.shape[2]
        ids = _rows(self.ids, parents)
        ids[:, :, place] = tokens
        ends = (tokens == end) | (place + 1 == most)
        self._keep_ended(scores, ids, ends, place + 1, penalty)
        self.scores, best = (scores + ends * HOPELESS).topk(beams)
        self.ids = _rows(ids, best)
        return parents.gather(1, best)

    def _keep_ended(self, scores: Tensor, ids: Tensor, ends: Tensor, length: int, penalty: float) -> None:
        """Of those found before and those among the best K that end now, the best K."""
        beams = self.scores.shape[1]
        scores, ids, ends = scores[:, :beams], ids[:, :beams], ends[:, :beams]
        merged = torch.cat((self.ended_scores, scores / length**penalty + ~ends * HOPELESS), dim=1)
        self.ended_scores, best = merged.topk(beams)
        self.ended_ids = _rows(torch.cat((self.ended_ids, ids), dim=1), best)
        self.ended_lengths = torch.cat((self.ended_lengths, ends * length), dim=1).gather(1, best)

    def going(self, length: int, penalty: float, early_stopping: bool) -> Tensor:
        """bool [n]: the best continuation, as good as it is now, beats one that has ended, or too few have ended."""
        full = (self.ended_lengths > 0).all(1)
        if early_stopping:
            return ~full
        return ~full | (self.scores[:, 0] / length**penalty > self.ended_scores.amin(1))


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    prompt: Tokens,
    *,
    beams: int,
    end: int,
    pad: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    source: Source | None = None,
) -> Generated:
    """The best continuation of every prompt that a search with so many at once finds.

    `early_stopping`: a sample stops as soon as `beams` continuations have ended. A pass computes the samples that go on; the
    host waits once per token, for how many these are.
    """
    decoding, count = Decoding(decoder, prompt, source, max_new_tokens, beams), prompt.layout.num_samples
    each = torch.arange(beams, device=prompt.hidden.device)
    search = Search.begin(count, beams, max_new_tokens, pad, each.device)
    result = Generated(search.ids[:, 0].clone(), search.ended_lengths[:, 0].clone(), search.ended_scores[:, 0].clone())
    logits = decoding.start()[:, None].expand(-1, beams, -1)
    for place in range(max_new_tokens):
        parents = search.advance(logits, place, end, length_penalty)
        _deliver(search, result)
        going = search.going(place + 1, length_penalty, early_stopping)
        parents, *rows = continuing(going, parents, *vars(search).values())
        search = Search(*rows)
        if place + 1 == max_new_tokens or not len(search.samples):
            break
        first = search.samples[:, None] * beams
        slots = (first + each).flatten()
        decoding.cache.copy((first + parents).flatten(), slots)
        logits = decoding.step(search.ids[:, :, place].flatten(), slots).unflatten(0, (-1, beams))
    return result


def _deliver(search: Search, result: Generated) -> None:
    """Write down the best of each sample so far."""
    for kept, best in zip(
        (result.ids, result.lengths, result.scores), (search.ended_ids, search.ended_lengths, search.ended_scores), strict=True
    ):
        kept[search.samples] = best[:, 0]


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """`[n, k, L]`: rows `index` `[n, k]` of `[n, m, L]`."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
