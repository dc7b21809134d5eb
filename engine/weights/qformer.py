"""BLIP-2's Q-Former."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights import bert
from engine.weights.pieces import Piece


def stack(layers: int, *, cross_every: int = 2, text: bool = True) -> Iterator[Piece]:
    """A `PackedTransformer` with groups ((queries,), (text,)) of `Blip2QFormerEncoder`'s tensors; without `text` of
    ((queries,),)."""
    for layer in range(layers):
        ours, theirs = f"blocks.{layer}", f"layer.{layer}"
        yield from bert.self_attention(f"{ours}.self_attention", f"{theirs}.attention", "attention")
        if layer % cross_every == 0:
            yield from bert.cross_attention(f"{ours}.cross_attention", f"{theirs}.crossattention", "attention")
        for number, suffix in enumerate(("_query", "") if text else ("_query",)):
            inner, output = f"{theirs}.intermediate{suffix}", f"{theirs}.output{suffix}"
            yield from bert.feed_forward(f"{ours}.feed_forwards.{number}", inner, output)
