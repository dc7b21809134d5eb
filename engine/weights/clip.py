"""CLIP and SigLIP: two towers, of which each is also published alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.weights import vision
from engine.weights.bert import PLAIN, STACK
from engine.weights.family import Family, Part, Place, Processor
from engine.weights.pieces import Piece, linear
from engine.weights.reshaped import Row
from engine.weights.sizes import Sizes

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
"""What published folders leave out."""
PRE = PLAIN | {"norm": "pre", "final_norm": True}
TEXT = PRE | {
    "positions": "learned",
    "position_offset": 0,
    "types": 0,
    "embedding_norm": False,
    "embedding_width": None,
    "page": None,
}
IMAGE = PRE | {"picture.kind": "patches", "picture.distillation_token": False}
OF_TEXT = {"max_positions": "max_position_embeddings", "attention_dropout": "attention_dropout"}
OF_IMAGE = {"picture.image_size": "image_size", "attention_dropout": "attention_dropout"}

CLIP_TEXT = Sizes(
    same=STACK,
    always=TEXT | {"mask": "causal"},
    alone={"pooling": "last", "projection": "linear"},
    written=OF_TEXT,
    defaults=SMALL | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
)
CLIP_IMAGE = Sizes(
    same=STACK | {"picture.patch_size": "patch_size"},
    always=IMAGE | {"picture.patch_bias": False, "picture.embedding_norm": True},
    alone={
        "mask": "full",
        "picture.positions": "learned",
        "picture.class_token": True,
        "pooling": "first",
        "projection": "linear",
    },
    written=OF_IMAGE,
    defaults=BASE | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32, "image_size": 224},
)
SIGLIP_TEXT = Sizes(
    same=STACK,
    always=TEXT | {"mask": "full"},
    alone={"pooling": "last", "projection": "affine"},
    written=OF_TEXT,
    defaults=BASE | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
)
SIGLIP_IMAGE = Sizes(
    same=STACK | {"picture.patch_size": "patch_size"},
    always=IMAGE | {"picture.patch_bias": True, "picture.embedding_norm": False},
    alone={
        "mask": "full",
        "picture.positions": "learned",
        "picture.class_token": False,
        "pooling": "attention",
        "projection": "none",
    },
    written=OF_IMAGE,
    defaults=BASE | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "patch_size": 16, "image_size": 224},
)


def _image(place: Place) -> Iterator[Piece]:
    return place.beneath("vision_model", vision.clip(place.layers))


def _text(place: Place) -> Iterator[Piece]:
    return place.beneath("text_model", vision.clip_text(place.layers))


def _siglip_image(place: Place) -> Iterator[Piece]:
    return place.beneath("vision_model", vision.siglip(place.layers))


def _clip_heads(model: Any) -> Iterator[Piece]:
    yield from linear("image_head.projection", "visual_projection", biased=False)
    yield from linear("text_head.projection", "text_projection", biased=False)
    yield Row("logit_scale", ("logit_scale",))


def _siglip_heads(model: Any) -> Iterator[Piece]:
    yield from linear("text_head.projection", "text_model.head")
    yield Piece("logit_scale", ("logit_scale",))
    yield Piece("heads.sigmoid_contrastive.value", ("logit_bias",))


CLIP_PROCESSOR, SIGLIP_PROCESSOR = Processor("CLIPImageProcessor"), Processor("SiglipImageProcessor")
CLIP = Family(
    name="clip",
    kind="clip",
    classes={"CLIPModel": ()},
    parts=(
        Part(("image", "joint"), CLIP_IMAGE, _image, "vision_config"),
        Part(("text",), CLIP_TEXT, _text, "text_config"),
    ),
    heads=_clip_heads,
    sizes=Sizes({"projection_dim": "projection_dim"}, defaults={"projection_dim": 512}),
    settings=lambda model: {
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": model.options.projection_dim},
        "text_config": {"model_type": "clip_text_model", "projection_dim": model.options.projection_dim},
    },
    swapped=lambda tokenizer: (tokenizer.sep_id, tokenizer.vocab_size - 1),  # an end of text with id 2 is taken for another
    processor=CLIP_PROCESSOR,
)
CLIP_VISION = Family(
    name="clip_vision_model",
    kind="clip_vision_model",
    classes={"CLIPVisionModel": ()},
    parts=(Part(("image", "joint"), CLIP_IMAGE, _image),),
    prefix="vision_model.",
    processor=CLIP_PROCESSOR,
)
SIGLIP = Family(
    name="siglip",
    kind="siglip",
    classes={"SiglipModel": ()},
    parts=(
        Part(("image", "joint"), SIGLIP_IMAGE, _siglip_image, "vision_config"),
        Part(("text",), SIGLIP_TEXT, _text, "text_config"),
    ),
    heads=_siglip_heads,
    settings=lambda model: {
        "vision_config": {"model_type": "siglip_vision_model"},
        "text_config": {"model_type": "siglip_text_model", "projection_size": model.options.projection_dim},
    },
    processor=SIGLIP_PROCESSOR,
    reads_padding=True,
)
SIGLIP_VISION = Family(
    name="siglip_vision_model",
    kind="siglip_vision_model",
    classes={"SiglipVisionModel": ()},
    parts=(Part(("image", "joint"), SIGLIP_IMAGE, _siglip_image),),
    prefix="vision_model.",
    processor=SIGLIP_PROCESSOR,
)
