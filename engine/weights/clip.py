"""The towers of CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.pieces import Piece, linear


def stack(layers: int) -> Iterator[Piece]:
    """The blocks of a pre-norm `PackedTransformer` of `CLIPEncoder`'s or `SiglipEncoder`'s tensors, without final norm."""
    for layer in range(layers):
        ours, theirs = f"blocks.{layer}", f"layers.{layer}"
        attention = f"{theirs}.self_attn"
        yield from linear(f"{ours}.self_attention.norm", f"{theirs}.layer_norm1")
        yield from linear(f"{ours}.self_attention.query_key_value", *(f"{attention}.{part}_proj" for part in "qkv"))
        yield from linear(f"{ours}.self_attention.output", f"{attention}.out_proj")
        yield from linear(f"{ours}.feed_forward.norm", f"{theirs}.layer_norm2")
        yield from linear(f"{ours}.feed_forward.inner", f"{theirs}.mlp.fc1")
        yield from linear(f"{ours}.feed_forward.output", f"{theirs}.mlp.fc2")
