"""ALBERT's one block."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.pieces import Piece, linear


def stack(ours: str, theirs: str) -> Iterator[Piece]:
    """A shared post-norm `PackedTransformer` of `AlbertTransformer`'s tensors, without the map behind its embeddings."""
    block, layer = f"{ours}.blocks.0", f"{theirs}.albert_layer_groups.0.albert_layers.0"
    attention = f"{layer}.attention"
    yield from linear(f"{block}.self_attention.query_key_value", *(f"{attention}.{p}" for p in ("query", "key", "value")))
    yield from linear(f"{block}.self_attention.output", f"{attention}.dense")
    yield from linear(f"{block}.self_attention.norm", f"{attention}.LayerNorm")
    yield from linear(f"{block}.feed_forward.inner", f"{layer}.ffn")
    yield from linear(f"{block}.feed_forward.output", f"{layer}.ffn_output")
    yield from linear(f"{block}.feed_forward.norm", f"{layer}.full_layer_layer_norm")
