"""LayoutLMv2's encoder, which is also LayoutXLM's."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights import bert
from engine.weights.family import Family, Part, Place
from engine.weights.pieces import Piece, beneath, linear
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


SIZES = bert.SIZES._replace(
    same=bert.STACK
    | {
        "relative_position.count": "rel_pos_bins",
        "relative_position.max_distance": "max_rel_pos",
        "relative_box.count": "rel_2d_pos_bins",
        "relative_box.max_distance": "max_rel_2d_pos",
    },
    always={
        **{name: value for name, value in bert.SIZES.always.items() if not name.startswith("relative_")},
        "biases": "no_key",
        "page": "concat",
        "image.kind": "grid",
        "image.positions": "text",
    },
    constants={"fast_qkv": True, "has_relative_attention_bias": True, "has_spatial_attention_bias": True},
    defaults=bert.SIZES.defaults
    | {"fast_qkv": True, "has_relative_attention_bias": True, "has_spatial_attention_bias": True}
    | {"rel_pos_bins": 32, "max_rel_pos": 128, "rel_2d_pos_bins": 64, "max_rel_2d_pos": 256},
)


def _role(place: Place) -> Iterator[Piece]:
    return beneath("joint", "layoutlmv2", joint(place.layers, picture_type=place.stack.image.type_of_text is not None))


LAYOUTLMV2 = Family(
    name="layoutlmv2",
    kind="layoutlmv2",
    classes={"LayoutLMv2Model": ()},
    parts=(Part(("joint",), SIZES, _role),),
    prefix="layoutlmv2.",
    is_written=False,  # the names of its backbone are detectron2's
)
