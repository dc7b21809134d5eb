"""ViLT: one stream of words and patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from engine.weights.bert import PLAIN, ROWS, STACK, word_heads
from engine.weights.family import Family, Part, Processor
from engine.weights.pieces import Piece, beneath, linear
from engine.weights.reshaped import AgainstNothing, Filters, Table
from engine.weights.sizes import Sizes

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


SIZES = Sizes(
    same=STACK | {"image.patch_size": "patch_size"},
    always=PLAIN
    | {
        "norm": "pre",
        "final_norm": True,
        "kinds": True,
        "positions": "learned",
        "position_offset": 0,
        "embedding_norm": True,
        "embedding_width": None,
        "page": None,
        "image.kind": "patches",
        "image.patch_bias": True,
        "image.embedding_norm": False,
        "image.distillation_token": False,
        "image.positions": "learned",
        "image.class_token": True,
    },
    alone={"queries": 0, "source": None, "mask": "full", "text": True, "has_types": True, "pooling": "pooler"},
    written=ROWS | {"max_positions": "max_position_embeddings", "image.image_size": "image_size"},
    constants={"qkv_bias": True},
    defaults={"qkv_bias": True, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "patch_size": 32, "image_size": 384},
)
VILT = Family(
    name="vilt",
    kind="vilt",
    classes={"ViltForMaskedLM": ("masked_language",), "ViltModel": ()},
    parts=(Part(("joint",), SIZES, lambda place: beneath("joint", "vilt", joint(place.layers))),),
    heads=lambda model: word_heads("mlm_score.transform.dense", "mlm_score.transform.LayerNorm", "mlm_score.decoder.bias"),
    prefix="vilt.",
    processor=Processor("ViltImageProcessor", fits=True),
    settings=lambda model: {"modality_type_vocab_size": 2, "max_image_length": -1},
)


def _ranks(model: Any) -> Iterator[Piece]:
    for kind in ("weight", "bias"):
        yield AgainstNothing(f"heads.random_matching.{kind}", (f"rank_output.{kind}",))


VILT_RANKS = dataclasses.replace(
    VILT, name="vilt_ranks", classes={"ViltForImageAndTextRetrieval": ("random_matching",)}, heads=_ranks
)
"""The released pretraining weights have no such head in `transformers`: only those of retrieval."""
