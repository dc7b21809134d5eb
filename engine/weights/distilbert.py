"""DistilBERT: BERT's blocks under other names, and no types."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights import bert
from engine.weights.family import Family, Part, Place
from engine.weights.pieces import Piece, beneath, linear
from engine.weights.sizes import Sizes

BLOCK = {
    "self_attention.query_key_value": ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
    "self_attention.output": ["attention.out_lin"],
    "self_attention.norm": ["sa_layer_norm"],
    "feed_forward.inner": ["ffn.lin1"],
    "feed_forward.output": ["ffn.lin2"],
    "feed_forward.norm": ["output_layer_norm"],
}


HEAD = ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
SIZES = Sizes(
    same={
        "width": "dim",
        "layers": "n_layers",
        "heads": "n_heads",
        "mlp_width": "hidden_dim",
        "activation": "activation",
    },
    always=bert.SIZES.always | {"eps": 1e-12},
    alone=bert.ALONE | {"has_types": False},
    written={"max_positions": "max_position_embeddings", "dropout": "dropout", "attention_dropout": "attention_dropout"},
    constants={"sinusoidal_pos_embds": False},
    defaults={"sinusoidal_pos_embds": False, "activation": "gelu"},
)


def masked_language(layers: int, head: str) -> Iterator[Piece]:
    """`DistilBertForMaskedLM`; `head` is the name of ours."""
    yield from beneath("text", "distilbert", _tables("embedder"))
    yield from stack("text.transformer", layers)
    yield from bert.masked_language(*HEAD, head)


def stack(ours: str, layers: int, first: int = 0) -> Iterator[Piece]:
    """A `PackedTransformer` of the layers from `first` on."""
    for layer in range(layers):
        for name, theirs in BLOCK.items():
            sources = (f"distilbert.transformer.layer.{first + layer}.{source}" for source in theirs)
            yield from linear(f"{ours}.blocks.{layer}.{name}", *sources)


def _tables(ours: str) -> Iterator[Piece]:
    return (piece for piece in bert.embedder(ours) if not piece.ours.endswith(".types"))


def _role(place: Place) -> Iterator[Piece]:
    if place.role != "fusion":
        yield from beneath("", "distilbert", _tables(place.words))
    yield from stack(place.transformer, place.layers, place.first)


DISTILBERT = Family(
    name="distilbert",
    kind="distilbert",
    classes={"DistilBertForMaskedLM": (), "DistilBertModel": ()},
    parts=(Part(bert.ROLES, SIZES, _role),),
    heads=lambda model: bert.word_heads(*HEAD),
    prefix="distilbert.",
)
