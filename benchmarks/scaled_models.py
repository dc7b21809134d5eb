"""Models of the field as parts of a `benchmarks.scaling.Run`: their parameters, tokens and passes."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.scaling import Part, Weight, total


def _matrix(rows: int, columns: int) -> Weight:
    return Weight(rows * columns, True)


def _vectors(*lengths: int) -> tuple[Weight, ...]:
    return tuple(Weight(length, False) for length in lengths)


def _attention(width: int) -> tuple[Weight, ...]:
    return 4 * (_matrix(width, width), *_vectors(width))


def transformer(layers: int, width: int, crossing: bool = False) -> tuple[Weight, ...]:
    """Blocks of attention and a feed-forward layer of 4 widths; crossing, with queries and outputs of another attention."""
    across = (*_attention(width)[:4], *_vectors(width, width)) if crossing else ()
    forward = (_matrix(4 * width, width), *_vectors(4 * width), _matrix(width, 4 * width), *_vectors(width))
    return layers * (*_attention(width), *_vectors(width, width), *across, *forward, *_vectors(width, width))


def _vision(layers: int, width: int, patch: int, tokens: int, out: int) -> Part:
    stem = (_matrix(width, 3 * patch * patch), *_vectors(width, width), _matrix(tokens, width))
    weights = (*stem, *transformer(layers, width), *_vectors(width, width), _matrix(out, width))
    return Part("images", weights, tokens, layers, width, tokens * width)


def _text(layers: int, width: int, vocabulary: int, tokens: int, positions: int, out: int) -> Part:
    tables = (_matrix(vocabulary, width), _matrix(positions, width))
    weights = (*tables, *transformer(layers, width), *_vectors(width, width), _matrix(out, width))
    return Part("texts", weights, tokens, layers, width, total(tables))


def frozen(part: Part) -> Part:
    return replace(part, name=f"{part.name}, momentum copy", weights=tuple(replace(w, trained=False) for w in part.weights))


def clip_large() -> tuple[Part, ...]:
    return (_vision(24, 1024, 14, 257, 768), _text(12, 768, 49408, 77, 77, 768), Part("scale", _vectors(1)))


def albef_base() -> tuple[Part, ...]:
    """Texts of 30 tokens, read as they are and masked; the fusion reads a pair, two negatives and the masked text.

    The head of masked words shares the word table. Momentum copies are not trained and read everything once.
    """
    images, texts = _vision(12, 768, 16, 257, 256), _text(6, 768, 30522, 30, 512, 256)
    fusion = Part("fusion", transformer(6, 768, crossing=True), 30, 6, 768)
    keys = Part("fusion, keys of images", 6 * _attention(768)[:4], 257)
    copies = map(frozen, (images, texts, fusion, keys))
    read_more = replace(texts, passes=2), replace(fusion, passes=4), replace(keys, passes=4)
    return (images, *read_more, *copies, Part("scale", _vectors(1)))
