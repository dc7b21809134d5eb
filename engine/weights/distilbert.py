"""DistilBERT: BERT's blocks under other names, and no types."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights import bert
from engine.weights.pieces import Piece, beneath, linear

BLOCK = {
    "self_attention.query_key_value": ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
    "self_attention.output": ["attention.out_lin"],
    "self_attention.norm": ["sa_layer_norm"],
    "feed_forward.inner": ["ffn.lin1"],
    "feed_forward.output": ["ffn.lin2"],
    "feed_forward.norm": ["output_layer_norm"],
}


def masked_language(layers: int, head: str) -> Iterator[Piece]:
    """`DistilBertForMaskedLM`; `head` is the name of ours."""
    tables = [piece for piece in bert.embedder("embedder") if piece.ours != "embedder.types"]
    yield from beneath("text", "distilbert", tables)
    for layer in range(layers):
        for ours, theirs in BLOCK.items():
            names = (f"distilbert.transformer.layer.{layer}.{name}" for name in theirs)
            yield from linear(f"text.transformer.blocks.{layer}.{ours}", *names)
    yield from bert.masked_language("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", head)
