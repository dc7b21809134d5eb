"""LayoutLMv2's encoder, which is also LayoutXLM's."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights import bert
from engine.weights.pieces import Piece, linear
from engine.weights.reshaped import Biases, LastRow

TABLES = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")


def stack(ours: str, theirs: str, layers: int) -> Iterator[Piece]:
    """A `PackedTransformer` of `LayoutLMv2Encoder`'s tensors."""
    for number, table in enumerate(TABLES):
        yield Piece(f"{ours}.distances.tables.{number}", (f"{theirs}.{table}.weight",), transposed=True)
    for layer in range(layers):
        block, source = f"{ours}.blocks.{layer}", f"{theirs}.layer.{layer}"
        attention = f"{source}.attention.self"
        yield Piece(f"{block}.self_attention.query_key_value.weight", (f"{attention}.qkv_linear.weight",))
        yield Biases(f"{block}.self_attention.query_key_value.bias", (f"{attention}.q_bias", f"{attention}.v_bias"))
        yield from linear(f"{block}.self_attention.output", f"{source}.attention.output.dense")
        yield from linear(f"{block}.self_attention.norm", f"{source}.attention.output.LayerNorm")
        yield from linear(f"{block}.feed_forward.inner", f"{source}.intermediate.dense")
        yield from linear(f"{block}.feed_forward.output", f"{source}.output.dense")
        yield from linear(f"{block}.feed_forward.norm", f"{source}.output.LayerNorm")


def joint(layers: int, *, picture_type: bool = False) -> Iterator[Piece]:
    """A joint role of `LayoutLMv2Model`'s tensors but for the backbone's. With `picture_type` the row that LayoutXLM adds
    to the tokens of a picture is the last one of our table of types."""
    types = ("embeddings.token_type_embeddings.weight", *(["visual_segment_embedding"] if picture_type else []))
    for piece in bert.embedder("text", page=True):
        yield LastRow(piece.ours, types) if picture_type and piece.ours == "text.types" else piece
    yield from linear("image.projection", "visual_proj")
    yield from linear("image.norm", "visual_LayerNorm")
    yield from stack("transformer", "encoder", layers)
    yield from linear("pooling.dense", "pooler.dense")
