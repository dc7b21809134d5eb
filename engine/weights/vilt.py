"""ViLT: one stream of words and patches."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.pieces import Piece, linear
from engine.weights.reshaped import Filters, Table

BLOCK = {
    "self_attention.query_key_value": [f"attention.attention.{part}" for part in ("query", "key", "value")],
    "self_attention.output": ["attention.output.dense"],
    "self_attention.norm": ["layernorm_before"],
    "feed_forward.inner": ["intermediate.dense"],
    "feed_forward.output": ["output.dense"],
    "feed_forward.norm": ["layernorm_after"],
}


def joint(layers: int) -> Iterator[Piece]:
    """A joint role of `ViltModel`'s tensors."""
    text = "embeddings.text_embeddings"
    for name, table in (("words", "word"), ("positions", "position"), ("types", "token_type")):
        yield Piece(f"text.{name}", (f"{text}.{table}_embeddings.weight",))
    yield from linear("text.norm", f"{text}.LayerNorm")
    yield Table("image.class_token", ("embeddings.cls_token",))
    yield Table("image.places.table", ("embeddings.position_embeddings",))
    yield Filters("image.projection.weight", ("embeddings.patch_embeddings.projection.weight",))
    yield Piece("image.projection.bias", ("embeddings.patch_embeddings.projection.bias",))
    yield Piece("kinds", ("embeddings.token_type_embeddings.weight",))
    for layer in range(layers):
        for name, sources in BLOCK.items():
            yield from linear(f"transformer.blocks.{layer}.{name}", *(f"encoder.layer.{layer}.{s}" for s in sources))
    yield from linear("transformer.final_norm", "layernorm")
    yield from linear("pooling.dense", "pooler.dense")
