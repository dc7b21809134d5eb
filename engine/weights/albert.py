"""ALBERT: one block, narrow tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.weights import bert
from engine.weights.family import Family, Part, Place
from engine.weights.pieces import Piece, beneath, linear


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


def pretraining() -> Iterator[Piece]:
    """`AlbertForPreTraining`."""
    yield from beneath("text", "albert", bert.embedder("embedder"))
    yield from linear("text.widening", "albert.encoder.embedding_hidden_mapping_in")
    yield from stack("text.transformer", "albert.encoder")
    yield from linear("text.pooling.dense", "albert.pooler")
    yield from bert.masked_language("predictions.dense", "predictions.LayerNorm", "predictions.bias")
    yield from linear("heads.sentence_order.classifier", "sop_classifier.classifier")


def _role(place: Place) -> Iterator[Piece]:
    yield from beneath("", "albert", bert.embedder(place.words))
    yield from linear(f"{place.role}.widening", "albert.encoder.embedding_hidden_mapping_in")
    yield from stack(place.transformer, "albert.encoder")
    yield from linear(f"{place.pooling}.dense", "albert.pooler")


def _heads(model: Any) -> Iterator[Piece]:
    yield from bert.word_heads("predictions.dense", "predictions.LayerNorm", "predictions.bias")
    yield from linear("heads.sentence_order.classifier", "sop_classifier.classifier")


ONE_BLOCK = {"num_hidden_groups": 1, "inner_group_num": 1}
SIZES = bert.SIZES._replace(
    same=bert.STACK | {"table_width": "embedding_size"},
    always={name: value for name, value in bert.SIZES.always.items() if name != "embedding_width"} | {"shared": True},
    alone=bert.ALONE | {"has_widening": True},
    constants=bert.ABSOLUTE | ONE_BLOCK,
    defaults=bert.SIZES.defaults | ONE_BLOCK | {"hidden_act": "gelu_new"},
)
ALBERT = Family(
    name="albert",
    kind="albert",
    classes={
        "AlbertForPreTraining": ("masked_language", "sentence_order"),
        "AlbertForMaskedLM": ("masked_language",),
        "AlbertModel": (),
    },
    parts=(Part(("text",), SIZES, _role),),
    heads=_heads,
    prefix="albert.",
)
