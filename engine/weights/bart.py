"""BART's stacks and tables."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.bert import PLAIN
from engine.weights.family import Family, Part, Place
from engine.weights.pieces import Piece, linear
from engine.weights.sizes import Sizes

CLS_ID = 1
"""What a text that is written begins with."""


def embedder(ours: str, theirs: str) -> Iterator[Piece]:
    """A `TextEmbedder` of the tables of `BartEncoder` or `BartDecoder`, but for the words, which both share."""
    yield Piece(f"{ours}.positions", (f"{theirs}.embed_positions.weight",))
    yield from linear(f"{ours}.norm", f"{theirs}.layernorm_embedding")


def stack(ours: str, theirs: str, layers: int, *, decoder: bool) -> Iterator[Piece]:
    """A post-norm `PackedTransformer` of the tensors of `BartEncoder` or `BartDecoder`, without their embeddings."""
    for layer in range(layers):
        yield from _block(f"{ours}.blocks.{layer}", f"{theirs}.layers.{layer}", decoder)


def _block(ours: str, theirs: str, decoder: bool) -> Iterator[Piece]:
    own, cross = f"{theirs}.self_attn", f"{theirs}.encoder_attn"
    yield from linear(f"{ours}.self_attention.query_key_value", *(f"{own}.{part}_proj" for part in "qkv"))
    yield from linear(f"{ours}.self_attention.output", f"{own}.out_proj")
    yield from linear(f"{ours}.self_attention.norm", f"{theirs}.self_attn_layer_norm")
    if decoder:
        yield from linear(f"{ours}.cross_attention.query", f"{cross}.q_proj")
        yield from linear(f"{ours}.cross_attention.key_value", f"{cross}.k_proj", f"{cross}.v_proj")
        yield from linear(f"{ours}.cross_attention.output", f"{cross}.out_proj")
        yield from linear(f"{ours}.cross_attention.norm", f"{theirs}.encoder_attn_layer_norm")
    yield from linear(f"{ours}.feed_forward.inner", f"{theirs}.fc1")
    yield from linear(f"{ours}.feed_forward.output", f"{theirs}.fc2")
    yield from linear(f"{ours}.feed_forward.norm", f"{theirs}.final_layer_norm")


def _sizes(part: str, **alone: str) -> Sizes:
    return Sizes(
        same={
            "width": "d_model",
            "layers": f"{part}_layers",
            "heads": f"{part}_attention_heads",
            "mlp_width": f"{part}_ffn_dim",
            "activation": "activation_function",
        },
        always=PLAIN
        | {
            "norm": "post",
            "eps": 1e-5,
            "positions": "learned",
            "position_offset": 2,
            "types": 0,
            "embedding_norm": True,
            "embedding_width": None,
            "page": None,
        },
        alone=alone,
        written={"max_positions": "max_position_embeddings", "dropout": "dropout", "attention_dropout": "attention_dropout"},
        constants={"scale_embedding": False},
        defaults={"scale_embedding": False, "activation_function": "gelu"},
    )


def _role(place: Place, part: str) -> Iterator[Piece]:
    theirs = f"model.{part}"
    yield Piece(f"{place.words}.words", ("model.shared.weight",))
    yield from embedder(place.words, theirs)
    yield from stack(place.transformer, theirs, place.layers, decoder=part == "decoder")


BART = Family(
    name="bart",
    kind="bart",
    classes={"BartForConditionalGeneration": ()},
    parts=(
        Part(("text",), _sizes("encoder", mask="full"), lambda place: _role(place, "encoder")),
        Part(("decoder",), _sizes("decoder", source="text", shares="words"), lambda place: _role(place, "decoder")),
    ),
    prefix="model.",
    settings=lambda model: {"decoder_start_token_id": CLS_ID},
)
