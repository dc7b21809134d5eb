"""BLIP-2: a Q-Former, whose queries and words attend to each other and whose queries read an image, and a language model."""

from __future__ import annotations

from collections.abc import Iterator

from typing import Any

from engine.weights import opt
from engine.weights.bert import PLAIN, STACK
from engine.weights.blip import PICTURE, PROCESSOR
from engine.weights.family import Family, Part, Place
from engine.weights.pieces import Piece, linear
from engine.weights.reshaped import Table
from engine.weights.sizes import Sizes

PARTS = ("query", "key", "value")


def stack(ours: str, theirs: str, layers: int, cross_every: int, *, words: bool = True) -> Iterator[Piece]:
    """A `PackedTransformer` with networks of their own for queries and words, or without words."""
    for layer in range(layers):
        block, source = f"{ours}.blocks.{layer}", f"{theirs}.layer.{layer}"
        own, cross = f"{source}.attention", f"{source}.crossattention"
        yield from linear(f"{block}.self_attention.query_key_value", *(f"{own}.attention.{part}" for part in PARTS))
        yield from _behind(f"{block}.self_attention", own)
        if layer % cross_every == 0:
            yield from linear(f"{block}.cross_attention.query", f"{cross}.attention.query")
            yield from linear(f"{block}.cross_attention.key_value", *(f"{cross}.attention.{part}" for part in PARTS[1:]))
            yield from _behind(f"{block}.cross_attention", cross)
        networks = {"feed_forwards.0": "_query", "feed_forwards.1": ""} if words else {"feed_forward": "_query"}
        for name, kind in networks.items():
            network = f"{block}.{name}"
            yield from linear(f"{network}.inner", f"{source}.intermediate{kind}.dense")
            yield from linear(f"{network}.output", f"{source}.output{kind}.dense")
            yield from linear(f"{network}.norm", f"{source}.output{kind}.LayerNorm")


def _behind(ours: str, theirs: str) -> Iterator[Piece]:
    yield from linear(f"{ours}.output", f"{theirs}.output.dense")
    yield from linear(f"{ours}.norm", f"{theirs}.output.LayerNorm")


def joint(place: Place) -> Iterator[Piece]:
    """A joint role of queries, with words beside them or without."""
    has_words = place.stack.text
    yield Table("joint.queries.learned", ("query_tokens",))
    if has_words:
        for name, table in (("words", "word"), ("positions", "position")):
            yield Piece(f"joint.text.{name}", (f"embeddings.{table}_embeddings.weight",))
    yield from linear("joint.text.norm" if has_words else "joint.queries_norm", "qformer.layernorm")
    yield from stack("joint.transformer", "qformer.encoder", place.layers, place.stack.cross_every, words=has_words)


SIZES = Sizes(
    same=STACK | {"cross_every": "cross_attention_frequency"},
    always=PLAIN | {"norm": "post", "embedding_norm": True, "source": "image", "cross_from": 0, "image": None},
    written={"dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"},
    defaults={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "cross_attention_frequency": 2,
    },
)
BESIDE_WORDS = SIZES._replace(
    always=SIZES.always | {"positions": "learned", "position_offset": 0, "types": 0, "kinds": False},
    alone={"text": True, "own_feed_forward": True},
    written={**SIZES.written, "max_positions": "max_position_embeddings"},
)
DECODER = opt.SIZES._replace(alone={"source": "joint", "reads": "prefix", "prefix_mask": "causal"})


SHOWN = PICTURE._replace(
    sizes=PICTURE.sizes._replace(
        defaults={
            "hidden_size": 1408,
            "num_hidden_layers": 39,
            "num_attention_heads": 16,
            "intermediate_size": 6144,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "patch_size": 14,
            "image_size": 224,
        }
    )
)
"""EVA-CLIP g/14, of which published folders may say nothing."""


def _retrieval_heads(_: Any) -> Iterator[Piece]:
    yield from linear("heads.query_contrastive.image", "vision_projection")
    yield from linear("heads.query_contrastive.text", "text_projection")
    yield from linear("heads.query_matching", "itm_head")


def _settings(model: Any) -> dict[str, Any]:
    options = model.options
    return {
        "vision_config": {"model_type": "blip_2_vision_model"},
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "encoder_hidden_size": options.image.width,
            "use_qformer_text_input": options.joint.text,
            "vocab_size": model.vocab_size,
        },
        "num_query_tokens": options.joint.queries,
    }


def _written_settings(model: Any) -> dict[str, Any]:
    return _settings(model) | {"text_config": {"model_type": "opt"}, "use_decoder_only_language_model": True}


BLIP2_STAGE1 = Family(
    name="blip2_stage1",
    kind="blip-2",
    classes={"Blip2ForImageTextRetrieval": ("query_contrastive", "query_matching")},
    parts=(SHOWN, Part(("joint",), BESIDE_WORDS, joint, "qformer_config")),
    heads=_retrieval_heads,
    sizes=Sizes({"projection_dim": "image_text_hidden_size"}, defaults={"image_text_hidden_size": 256}),
    settings=_settings,
    processor=PROCESSOR,
)
BLIP2_STAGE2 = Family(
    name="blip2_stage2",
    kind="blip-2",
    classes={"Blip2ForConditionalGeneration": ()},
    parts=(
        SHOWN,
        Part(("joint",), SIZES._replace(alone={"text": False}), joint, "qformer_config"),
        Part(("decoder",), DECODER, lambda place: opt.decoder(place, "language_model.model.decoder"), "text_config"),
    ),
    heads=lambda model: linear("decoder.prefix", "language_projection"),
    settings=_written_settings,
    processor=PROCESSOR,
)
