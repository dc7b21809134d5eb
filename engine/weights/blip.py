"""BLIP's names: a picture tower, and BERT's of the texts."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights import bert, vision
from engine.weights.pieces import Piece, beneath, linear
from engine.weights.reshaped import Filters, Table

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
    head, theirs = "heads.causal_language", "text_decoder.cls.predictions"
    yield from linear(f"{head}.transform", f"{theirs}.transform.dense")
    yield from linear(f"{head}.norm", f"{theirs}.transform.LayerNorm")
    yield Piece(f"{head}.bias", (f"{theirs}.bias",))


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
