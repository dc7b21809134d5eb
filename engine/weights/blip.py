"""BLIP's names: a picture tower, and BERT's of the texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.weights import bert, vision
from engine.weights.bert import POST, STACK
from engine.weights.clip import IMAGE as TOWER
from engine.weights.clip import OF_IMAGE
from engine.weights.family import Family, Part, Place, Processor
from engine.weights.pieces import Piece, beneath, linear
from engine.weights.reshaped import Filters, Table
from engine.weights.sizes import Sizes

IMAGE = {
    "self_attention.query_key_value": ["self_attn.qkv"],
    "self_attention.output": ["self_attn.projection"],
    "self_attention.norm": ["layer_norm1"],
    "feed_forward.inner": ["mlp.fc1"],
    "feed_forward.output": ["mlp.fc2"],
    "feed_forward.norm": ["layer_norm2"],
}
"""Sub-layers of a block of the picture tower."""


def retrieval(image_layers: int, text_layers: int) -> Iterator[Piece]:
    """Towers, fusion and matching head of `BlipForImageTextRetrieval`'s tensors."""
    yield from image_tower(image_layers)
    for piece in beneath("text", "text_encoder", text(text_layers)):
        # The fusion role has its blocks from the text role, but for cross-attention.
        crosses = ".cross_attention." in piece.ours
        yield piece._replace(ours=piece.ours.replace("text.", "fusion.", 1)) if crosses else piece
    yield from linear("image_head.projection", "vision_proj")
    yield from linear("text_head.projection", "text_proj")
    yield from linear("heads.matching.classifier", "itm_head")


def captioning(image_layers: int, text_layers: int) -> Iterator[Piece]:
    """Picture tower, decoder and its head of `BlipForConditionalGeneration`'s tensors."""
    yield from image_tower(image_layers)
    yield from beneath("decoder", "text_decoder.bert", text(text_layers))
    yield from _captioning_head(None)


def image_tower(layers: int) -> Iterator[Piece]:
    """The image role."""
    return beneath("image", "vision_model", _image(layers))


def text(layers: int) -> Iterator[Piece]:
    """A text role with cross-attention in every block."""
    for name, table in (("words", "word"), ("positions", "position")):
        yield Piece(f"embedder.{name}", (f"embeddings.{table}_embeddings.weight",))
    yield from linear("embedder.norm", "embeddings.LayerNorm")
    yield from bert.stack("transformer", layers, crosses=True)


def _image(layers: int) -> Iterator[Piece]:
    yield Table("embedder.class_token", ("embeddings.class_embedding",))
    yield Table("embedder.places.table", ("embeddings.position_embedding",))
    yield Filters("embedder.projection.weight", ("embeddings.patch_embedding.weight",))
    yield Piece("embedder.projection.bias", ("embeddings.patch_embedding.bias",))
    yield from vision.stack("transformer", "encoder.layers", layers, IMAGE)
    yield from linear("transformer.final_norm", "post_layernorm")


def _captioning_head(_: Any) -> Iterator[Piece]:
    names = (f"text_decoder.{name}" for name in bert.BERT_HEAD)
    return bert.masked_language(*names, ours="heads.causal_language")


IMAGE_SIZES = Sizes(
    same=STACK | {"picture.patch_size": "patch_size"},
    always=TOWER | {"picture.patch_bias": True, "picture.embedding_norm": False},
    alone={"mask": "full", "picture.positions": "learned", "picture.class_token": True, "pooling": "first"},
    written=OF_IMAGE,
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5},
)
"""Of BLIP's tower, and of BLIP-2's EVA-CLIP."""
TEXT_SIZES = Sizes(
    same=STACK,
    always=POST | {"position_offset": 0, "types": 0, "page": None},
    written={
        "max_positions": "max_position_embeddings",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12},
)
ALONE = {"mask": "full", "begins_with": "ids", "source": "image", "reads": "attention", "cross_from": 0, "cross_every": 1}


def _picture(place: Place) -> Iterator[Piece]:
    return place.beneath("vision_model", _image(place.layers))


def _words(place: Place, theirs: str) -> Iterator[Piece]:
    return place.beneath(theirs, text(place.layers))


def _retrieval_heads(_: Any) -> Iterator[Piece]:
    yield from linear("image_head.projection", "vision_proj")
    yield from linear("text_head.projection", "text_proj")
    yield from linear("heads.matching.classifier", "itm_head")


def _settings(model: Any) -> dict[str, Any]:
    """The id that a caption begins with is the last but one, as published."""
    return {
        "vision_config": {"model_type": "blip_vision_model"},
        "text_config": {
            "model_type": "blip_text_model",
            "is_decoder": True,
            "encoder_hidden_size": model.options.image.width,
            "bos_token_id": model.vocab_size - 2,
        },
    }


PICTURE = Part(("image", "joint"), IMAGE_SIZES, _picture, "vision_config")
PROCESSOR = Processor("BlipImageProcessor")
WRITER_SIZES = TEXT_SIZES._replace(alone=ALONE)
BLIP = Family(
    name="blip",
    kind="blip",
    classes={"BlipForImageTextRetrieval": ("matching",)},
    parts=(
        PICTURE,
        Part(("text",), WRITER_SIZES, lambda place: _words(place, "text_encoder"), "text_config"),
        Part(("fusion",), WRITER_SIZES, lambda place: _words(place, "text_encoder"), "text_config"),
    ),
    heads=_retrieval_heads,
    sizes=Sizes({"projection_dim": "image_text_hidden_size"}, defaults={"image_text_hidden_size": 256}),
    settings=_settings,
    processor=PROCESSOR,
)
BLIP_CAPTIONS = Family(
    name="blip_captions",
    kind="blip",
    classes={"BlipForConditionalGeneration": ("causal_language",)},
    parts=(PICTURE, Part(("decoder",), WRITER_SIZES, lambda place: _words(place, "text_decoder.bert"), "text_config")),
    heads=_captioning_head,
    settings=_settings,
    processor=PROCESSOR,
)
