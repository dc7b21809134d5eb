"""Span corruption and prefix language modelling after T5: an encoder's input and a decoder's target."""

import numpy as np

from engine.corruption.spans import runs


def corrupt_spans(
    ids: np.ndarray,
    sentinels: np.ndarray,
    eos_id: int,
    random: np.random.Generator,
    density: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of ids without special tokens; both end with `eos_id`.

    In the inputs the n-th noise span is the n-th sentinel; the targets are each sentinel with what it stands for.
    """
    noise = noise_mask(len(ids), density, mean_span, random)
    inputs, targets = (_with_sentinels(ids, part, sentinels) for part in (noise, ~noise))
    return np.append(inputs, eos_id), np.append(targets, eos_id)


def noise_mask(length: int, density: float, mean_span: float, random: np.random.Generator) -> np.ndarray:
    """bool [length]: round(length * density) tokens in round(that / mean_span) spans, at least one of each.

    The first span is kept, the last is noise; all such divisions are equally likely.
    """
    length, asked = max(length, 2), length
    noise = min(max(round(length * density), 1), length - 1)
    spans = max(round(noise / mean_span), 1)
    noise_lengths = _random_segments(noise, spans, random)
    kept_lengths = _random_segments(length - noise, spans, random)
    lengths = np.stack([kept_lengths, noise_lengths], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)[:asked]


def _random_segments(items: int, segments: int, random: np.random.Generator) -> np.ndarray:
    """int [segments]: positive lengths that add up to `items`, every choice equally likely."""
    assert segments <= items, (segments, items)
    cuts = np.sort(random.permutation(items - 1)[: segments - 1]) + 1
    return np.diff(cuts, prepend=0, append=items)


def _with_sentinels(ids: np.ndarray, noise: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """The ids with each run of noise replaced by a sentinel, in order."""
    starts, _ = runs(noise)
    if len(starts) > len(sentinels):
        raise ValueError(f"{len(starts)} spans need as many sentinels, the tokenizer has {len(sentinels)}")
    replaced = ids.copy()
    replaced[starts] = sentinels[: len(starts)]
    kept = ~noise
    kept[starts] = True
    return replaced[kept]


def prefix_length(length: int, random: np.random.Generator, least: int = 1) -> int:
    """How many of `length` tokens are read before the rest is predicted: uniform on `least` .. length - 1.

    T5 reads at least one; SimVLM reads the picture and may read none of its text.
    """
    return int(random.integers(min(least, length - 1), length))
