"""LayoutLMv2's encoder, which is also LayoutXLM's."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.pieces import Piece, linear

TABLES = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")


def stack(layers: int) -> Iterator[Piece]:
    """A `PackedTransformer` of `LayoutLMv2Encoder`'s tensors."""
    for number, table in enumerate(TABLES):
        yield Piece(f"distances.tables.{number}", (f"{table}.weight",), transposed=True)
    for layer in range(layers):
        ours, theirs = f"blocks.{layer}", f"layer.{layer}"
        attention = f"{theirs}.attention.self"
        yield Piece(f"{ours}.self_attention.query_key_value.weight", (f"{attention}.qkv_linear.weight",))
        yield Piece(f"{ours}.self_attention.query_key_value.bias", (f"{attention}.q_bias", f"{attention}.v_bias"))
        yield from linear(f"{ours}.self_attention.output", f"{theirs}.attention.output.dense")
        yield from linear(f"{ours}.self_attention.norm", f"{theirs}.attention.output.LayerNorm")
        yield from linear(f"{ours}.feed_forward.inner", f"{theirs}.intermediate.dense")
        yield from linear(f"{ours}.feed_forward.output", f"{theirs}.output.dense")
        yield from linear(f"{ours}.feed_forward.norm", f"{theirs}.output.LayerNorm")
