"""LayoutLMv2's encoder, which is also LayoutXLM's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.embedding.page import COORDINATES
from engine.weights import bert, pyramid
from engine.weights.family import Family, Part, Place, Processor
from engine.weights.pieces import Piece, beneath, linear
from engine.weights.reshaped import Biases, LastRow

TABLES = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")


def stack(ours: str, theirs: str, layers: int, *, biases: str = "no_key", distances: int = len(TABLES)) -> Iterator[Piece]:
    """A `PackedTransformer` of `LayoutLMv2Encoder`'s tensors, which keeps queries, keys and values apart where all have
    biases."""
    for number, table in enumerate(TABLES[:distances]):
        yield Piece(f"{ours}.distances.tables.{number}", (f"{theirs}.{table}.weight",), transposed=True)
    for layer in range(layers):
        block, source = f"{ours}.blocks.{layer}", f"{theirs}.layer.{layer}"
        attention, own = f"{source}.attention.self", f"{block}.self_attention.query_key_value"
        if biases == "no_key":
            yield Piece(f"{own}.weight", (f"{attention}.qkv_linear.weight",))
            yield Biases(f"{own}.bias", (f"{attention}.q_bias", f"{attention}.v_bias"))
        else:
            yield from linear(own, *(f"{attention}.{part}" for part in ("query", "key", "value")))
        yield from linear(f"{block}.self_attention.output", f"{source}.attention.output.dense")
        yield from linear(f"{block}.self_attention.norm", f"{source}.attention.output.LayerNorm")
        yield from linear(f"{block}.feed_forward.inner", f"{source}.intermediate.dense")
        yield from linear(f"{block}.feed_forward.output", f"{source}.output.dense")
        yield from linear(f"{block}.feed_forward.norm", f"{source}.output.LayerNorm")


def joint(layers: int, *, picture_type: bool = False, **encoder: Any) -> Iterator[Piece]:
    """A joint role of `LayoutLMv2Model`'s tensors but for the backbone's. With `picture_type` the row that LayoutXLM adds
    to the tokens of a picture is the last one of our table of types; `encoder` is as of `stack`."""
    types = ("embeddings.token_type_embeddings.weight", *(["visual_segment_embedding"] if picture_type else []))
    for piece in bert.embedder("text", page=True):
        yield LastRow(piece.ours, types) if picture_type and piece.ours == "text.types" else piece
    yield from linear("image.projection", "visual_proj")
    yield from linear("image.norm", "visual_LayerNorm")
    yield from stack("transformer", "encoder", layers, **encoder)
    yield from linear("pooling.dense", "pooler.dense")


DISTANCES = {"has_relative_attention_bias": ("rel_pos_bins", "max_rel_pos")}
BOXES = {"has_spatial_attention_bias": ("rel_2d_pos_bins", "max_rel_2d_pos")}
SIZES = bert.SIZES._replace(
    same=bert.STACK
    | {
        "biases": "fast_qkv",
        "has_relative_position": "has_relative_attention_bias",
        "relative_position.count": "rel_pos_bins",
        "relative_position.max_distance": "max_rel_pos",
        "has_relative_box": "has_spatial_attention_bias",
        "relative_box.count": "rel_2d_pos_bins",
        "relative_box.max_distance": "max_rel_2d_pos",
        "image.has_type": "has_visual_segment_embedding",
        "edge_width": "coordinate_size",
        "side_width": "shape_size",
    },
    always={
        **{name: value for name, value in bert.SIZES.always.items() if not name.startswith(("relative_", "biases"))},
        "page": "concat",
        "image.kind": "grid",
        "image.positions": "text",
        "image.has_pyramid": True,
        "image.grid_pooling": "mean",
        "image.codes": 0,
        "image.unit_cells": False,
        "image.embedding_norm": True,
        "type_is_last": True,
    },
    alone={"queries": 0, "source": None, "kinds": False, "mask": "full", "text": True, "has_types": True, "pooling": "pooler"},
    written={
        "types_of_text": "type_vocab_size",
        "max_positions": "max_position_embeddings",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    constants={},
    defaults=bert.SIZES.defaults
    | {"fast_qkv": True, "has_relative_attention_bias": True, "has_spatial_attention_bias": True}
    | {"rel_pos_bins": 32, "max_rel_pos": 128, "rel_2d_pos_bins": 64, "max_rel_2d_pos": 256}
    | {"has_visual_segment_embedding": False, "coordinate_size": 128, "shape_size": 128},
    switches=DISTANCES | BOXES,
)


def _role(place: Place) -> Iterator[Piece]:
    section = place.stack
    distances = (section.relative_position is not None) + 2 * (section.relative_box is not None)
    picture_type = section.image.type_of_text is not None
    pieces = joint(place.layers, picture_type=picture_type, biases=section.biases, distances=distances)
    return beneath("joint", "layoutlmv2", pieces)


def _settings(model: Any) -> dict[str, Any]:
    image = model.options.joint.image
    channels = model.joint.image.backbone.channels
    return {
        "max_2d_position_embeddings": COORDINATES,
        "image_feature_pool_shape": [*image.max_grid, channels],
        pyramid.SECTION: pyramid.DETECTOR,
    }


AS_BYTES = {"do_rescale": False, "do_normalize": False, "apply_ocr": False}
"""The model itself normalises; words are the user's, as they were those of the pages."""
LAYOUTLMV2 = Family(
    name="layoutlmv2",
    kind="layoutlmv2",
    classes={"LayoutLMv2Model": ()},
    parts=(Part(("joint",), SIZES, _role), pyramid.PART),
    prefix="layoutlmv2.",
    settings=_settings,
    tokenizers={"WordPiece": "LayoutLMv2Tokenizer"},
    processor=Processor("LayoutLMv2ImageProcessor", entries=AS_BYTES),
    prepared=lambda transform: {pyramid.SECTION: pyramid.normalization(transform.mean, transform.std)},
    normalization=lambda folder: pyramid.read_normalization(folder.config),
)
