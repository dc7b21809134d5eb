"""T5's stacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.weights.family import Family, Part, Place
from engine.weights.pieces import Piece, linear
from engine.weights.sizes import Sizes

PAD_ID = 0
"""What its decoder begins with."""


def stack(ours: str, theirs: str, layers: int, *, decoder: bool, gated: bool) -> Iterator[Piece]:
    """A `PackedTransformer` of `T5Stack`'s tensors."""
    first = f"{theirs}.block.0.layer.0.SelfAttention"
    yield Piece(f"{ours}.distances.tables.0", (f"{first}.relative_attention_bias.weight",))
    for layer in range(layers):
        yield from _block(f"{ours}.blocks.{layer}", f"{theirs}.block.{layer}.layer", decoder, gated)
    yield from linear(f"{ours}.final_norm", f"{theirs}.final_layer_norm", biased=False)


def _block(ours: str, theirs: str, decoder: bool, gated: bool) -> Iterator[Piece]:
    own, cross, last = f"{theirs}.0.SelfAttention", f"{theirs}.1.EncDecAttention", 2 if decoder else 1
    inner = ("wi_0", "wi_1") if gated else ("wi",)
    maps = {
        "self_attention.norm": [f"{theirs}.0.layer_norm"],
        "self_attention.query_key_value": [f"{own}.{part}" for part in "qkv"],
        "self_attention.output": [f"{own}.o"],
        "feed_forward.norm": [f"{theirs}.{last}.layer_norm"],
        "feed_forward.inner": [f"{theirs}.{last}.DenseReluDense.{part}" for part in inner],
        "feed_forward.output": [f"{theirs}.{last}.DenseReluDense.wo"],
    }
    if decoder:
        maps |= {
            "cross_attention.norm": [f"{theirs}.1.layer_norm"],
            "cross_attention.query": [f"{cross}.q"],
            "cross_attention.key_value": [f"{cross}.{part}" for part in "kv"],
            "cross_attention.output": [f"{cross}.o"],
        }
    for name, sources in maps.items():
        yield from linear(f"{ours}.{name}", *sources, biased=False)


def _sizes(layers: str, **always: object) -> Sizes:
    return Sizes(
        same={
            "width": "d_model",
            "layers": layers,
            "heads": "num_heads",
            "head_width": "d_kv",
            "mlp_width": "d_ff",
            "eps": "layer_norm_epsilon",
            "feed_forward": "feed_forward_proj",
            "relative_position.count": "relative_attention_num_buckets",
            "relative_position.max_distance": "relative_attention_max_distance",
        },
        always={
            "norm": "pre",
            "norm_kind": "rms",
            "final_norm": True,
            "biases": "none",
            "shared": False,
            "softmax_scale": 1.0,
            "relative_box": None,
            "positions": "none",
            "types": 0,
            "embedding_norm": False,
            "embedding_width": None,
            "page": None,
            **always,
        },
        written={"dropout": "dropout_rate"},
        defaults={
            "feed_forward_proj": "relu",
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6,
            "num_decoder_layers": lambda settings: settings["num_layers"],
        },
    )


def _role(place: Place, theirs: str) -> Iterator[Piece]:
    yield Piece(f"{place.words}.words", ("shared.weight",))
    yield from stack(place.transformer, theirs, place.layers, decoder=theirs == "decoder", gated=place.stack.gated)


WRITERS = ("denoising", "causal_language")


def _heads(model: Any) -> Iterator[Piece]:
    for head in WRITERS:
        yield Piece(f"heads.{head}.words", ("lm_head.weight",))


def _settings(model: Any) -> dict[str, Any]:
    """That T5 1.1 neither shares its table nor scales the states is one setting, which `transformers` renames."""
    scales = all(model.heads[head].factor != 1 for head in WRITERS if head in model.heads)
    return {
        "decoder_start_token_id": PAD_ID,
        "is_encoder_decoder": True,
        "tie_word_embeddings": scales,
        "scale_decoder_outputs": scales,
    }


T5 = Family(
    name="t5",
    kind="t5",
    classes={"T5ForConditionalGeneration": ()},
    parts=(
        Part(
            ("text",),
            _sizes("num_layers", **{"relative_position.bidirectional": True})._replace(alone={"mask": "full"}),
            lambda place: _role(place, "encoder"),
        ),
        Part(
            ("decoder",),
            _sizes("num_decoder_layers", **{"relative_position.bidirectional": False})._replace(
                alone={"source": "text", "shares": "words"}
            ),
            lambda place: _role(place, "decoder"),
        ),
    ),
    heads=_heads,
    borders="end",
    sizes=Sizes({}, defaults={"scale_decoder_outputs": lambda settings: settings.get("tie_word_embeddings") is not False}),
    settings=_settings,
    agreeing=("scale_decoder_outputs",),
)
