"""BLIP-2's Q-Former: queries and words that attend to each other, queries that read an image."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.pieces import Piece, linear

PARTS = ("query", "key", "value")


def stack(ours: str, theirs: str, layers: int, cross_every: int) -> Iterator[Piece]:
    """A `PackedTransformer` with networks of their own for queries and words."""
    for layer in range(layers):
        block, source = f"{ours}.blocks.{layer}", f"{theirs}.layer.{layer}"
        own, cross = f"{source}.attention", f"{source}.crossattention"
        yield from linear(f"{block}.self_attention.query_key_value", *(f"{own}.attention.{part}" for part in PARTS))
        yield from _behind(f"{block}.self_attention", own)
        if layer % cross_every == 0:
            yield from linear(f"{block}.cross_attention.query", f"{cross}.attention.query")
            yield from linear(f"{block}.cross_attention.key_value", *(f"{cross}.attention.{part}" for part in PARTS[1:]))
            yield from _behind(f"{block}.cross_attention", cross)
        for number, kind in enumerate(("_query", "")):
            network = f"{block}.feed_forwards.{number}"
            yield from linear(f"{network}.inner", f"{source}.intermediate{kind}.dense")
            yield from linear(f"{network}.output", f"{source}.output{kind}.dense")
            yield from linear(f"{network}.norm", f"{source}.output{kind}.LayerNorm")


def _behind(ours: str, theirs: str) -> Iterator[Piece]:
    yield from linear(f"{ours}.output", f"{theirs}.output.dense")
    yield from linear(f"{ours}.norm", f"{theirs}.output.LayerNorm")
