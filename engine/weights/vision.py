"""Vision towers: ViT's, CLIP's, SigLIP's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.weights.bert import PLAIN, STACK
from engine.weights.family import Family, Part, Place, Processor
from engine.weights.pieces import Piece, beneath, linear
from engine.weights.reshaped import Filters, Pixels, Row, Table
from engine.weights.sizes import Sizes

VIT_BLOCK = {
    "self_attention.query_key_value": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "self_attention.output": ["attention.o_proj"],
    "self_attention.norm": ["layernorm_before"],
    "feed_forward.inner": ["mlp.fc1"],
    "feed_forward.output": ["mlp.fc2"],
    "feed_forward.norm": ["layernorm_after"],
}
CLIP_BLOCK = {
    "self_attention.query_key_value": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention.output": ["self_attn.out_proj"],
    "self_attention.norm": ["layer_norm1"],
    "feed_forward.inner": ["mlp.fc1"],
    "feed_forward.output": ["mlp.fc2"],
    "feed_forward.norm": ["layer_norm2"],
}
"""Sub-layers of a block; SigLIP has CLIP's."""


def vit(layers: int, *, pooler: bool, learned_positions: bool = True, distilled: bool = False) -> Iterator[Piece]:
    """An image role of `ViTModel`'s tensors, or of `ViTMAEModel`'s, whose positions are not learned, or of `DeiTModel`'s."""
    yield Table("embedder.class_token", ("embeddings.cls_token", *(["embeddings.distillation_token"] if distilled else [])))
    if learned_positions:
        yield Table("embedder.places.table", ("embeddings.position_embeddings",))
    yield Filters("embedder.projection.weight", ("embeddings.patch_embeddings.projection.weight",))
    yield Piece("embedder.projection.bias", ("embeddings.patch_embeddings.projection.bias",))
    yield from stack("transformer", "layers", layers, VIT_BLOCK)
    yield from linear("transformer.final_norm", "layernorm")
    if pooler:
        yield from linear("pooling.dense", "pooler.dense")


def mae_decoder(layers: int) -> Iterator[Piece]:
    """The head of masked patches, of the tensors of `ViTMAEForPreTraining`'s decoder."""
    yield Table("mask_row", ("mask_token",))
    yield from linear("narrowing", "decoder_embed")
    yield from stack("transformer", "decoder_layers", layers, VIT_BLOCK)
    yield from linear("transformer.final_norm", "decoder_norm")
    for kind in ("weight", "bias"):
        yield Pixels(f"pixels.{kind}", (f"decoder_pred.{kind}",))


def clip(layers: int) -> Iterator[Piece]:
    """An image role of `CLIPVisionModel`'s tensors."""
    yield Row("embedder.class_token", ("embeddings.class_embedding",))
    yield Piece("embedder.places.table", ("embeddings.position_embedding.weight",))
    yield Filters("embedder.projection.weight", ("embeddings.patch_embedding.weight",))
    yield from linear("embedder.norm", "pre_layrnorm")
    yield from stack("transformer", "encoder.layers", layers, CLIP_BLOCK)
    yield from linear("transformer.final_norm", "post_layernorm")


def clip_text(layers: int) -> Iterator[Piece]:
    """A text role of `CLIPTextModel`'s tensors, or of SigLIP's but for its head."""
    yield Piece("embedder.words", ("embeddings.token_embedding.weight",))
    yield Piece("embedder.positions", ("embeddings.position_embedding.weight",))
    yield from stack("transformer", "encoder.layers", layers, CLIP_BLOCK)
    yield from linear("transformer.final_norm", "final_layer_norm")


def stack(ours: str, theirs: str, layers: int, names: dict[str, list[str]]) -> Iterator[Piece]:
    """A `PackedTransformer`."""
    for layer in range(layers):
        for name, sources in names.items():
            yield from linear(f"{ours}.blocks.{layer}.{name}", *(f"{theirs}.{layer}.{source}" for source in sources))


def siglip(layers: int) -> Iterator[Piece]:
    """An image role of `SiglipVisionModel`'s tensors."""
    yield Piece("embedder.places.table", ("embeddings.position_embedding.weight",))
    yield Filters("embedder.projection.weight", ("embeddings.patch_embedding.weight",))
    yield Piece("embedder.projection.bias", ("embeddings.patch_embedding.bias",))
    yield from stack("transformer", "encoder.layers", layers, CLIP_BLOCK)
    yield from linear("transformer.final_norm", "post_layernorm")
    ours, theirs = "pooling.attention", "head"
    yield Table(f"{ours}.probe", (f"{theirs}.probe",))
    for kind in ("weight", "bias"):
        yield Piece(f"{ours}.query_key_value.{kind}", (f"{theirs}.attention.in_proj_{kind}",))
    for name, source in (("output", "attention.out_proj"), ("norm", "layernorm"), ("inner", "mlp.fc1"), ("outer", "mlp.fc2")):
        yield from linear(f"{ours}.{name}", f"{theirs}.{source}")


VIT_SIZES = Sizes(
    same=STACK | {"picture.patch_size": "patch_size"},
    always=PLAIN
    | {
        "norm": "pre",
        "final_norm": True,
        "picture.kind": "patches",
        "picture.patch_bias": True,
        "picture.embedding_norm": False,
        "picture.distillation_token": False,
    },
    alone={"picture.positions": "learned", "picture.class_token": True, "mask": "full", "text": False, "queries": 0},
    written={
        "picture.image_size": "image_size",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    constants={"qkv_bias": True},
    defaults={"qkv_bias": True, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "patch_size": 16, "image_size": 224},
)
SPELLINGS = (
    ("vit.encoder.layer.", "vit.layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def _vit(place: Place) -> Iterator[Piece]:
    return place.beneath("vit", vit(place.layers, pooler=place.role == "image"))


def _classes(model: Any) -> dict[str, Any]:
    head = model.heads["classification"] if "classification" in model.heads else None
    return {} if head is None else {"num_labels": len(head.classifier.weight)}


PROCESSOR = Processor("ViTImageProcessor")
VIT = Family(
    name="vit",
    kind="vit",
    classes={"ViTForImageClassification": ("classification",), "ViTModel": ()},
    parts=(Part(("image", "joint"), VIT_SIZES, _vit),),
    heads=lambda model: linear("heads.classification.classifier", "classifier"),
    prefix="vit.",
    spellings=SPELLINGS,
    settings=_classes,
    processor=PROCESSOR,
)


def _deit(place: Place) -> Iterator[Piece]:
    return place.beneath("deit", vit(place.layers, pooler=place.role == "image", distilled=True))


DEIT = Family(
    name="deit",
    kind="deit",
    classes={"DeiTForImageClassification": ("classification",), "DeiTModel": ()},
    parts=(Part(("image",), VIT_SIZES._replace(always={**VIT_SIZES.always, "picture.distillation_token": True}), _deit),),
    heads=VIT.heads,
    prefix="deit.",
    spellings=(("deit.encoder.layer.", "deit.layers."), *SPELLINGS[1:]),
    settings=_classes,
    processor=Processor("DeiTImageProcessor"),
)
"""With a token for its teacher; without one a DeiT is a ViT."""


def _mae(place: Place) -> Iterator[Piece]:
    return place.beneath("vit", vit(place.layers, pooler=False))


def _mae_heads(model: Any) -> Iterator[Piece]:
    """What predicts the pixels, and its table of sines, which is written too."""
    if (head := _decoder_of(model)) is not None:
        own = Table("places.table", ("decoder_pos_embed",)), *mae_decoder(len(head.transformer.blocks))
        yield from beneath("heads.masked_patches", "decoder", own)


def _mae_settings(model: Any) -> dict[str, Any]:
    if (head := _decoder_of(model)) is None:
        return {}
    block = head.transformer.blocks[0]
    return {
        "decoder_hidden_size": head.narrowing.out_features,
        "decoder_num_hidden_layers": len(head.transformer.blocks),
        "decoder_num_attention_heads": block.self_attention.heads,
        "decoder_intermediate_size": block.feed_forward.inner.out_features,
        "norm_pix_loss": True,
    }


def _decoder_of(model: Any) -> Any:
    return model.heads["masked_patches"] if "masked_patches" in model.heads else None


MAE = Family(
    name="vit_mae",
    kind="vit_mae",
    classes={"ViTMAEForPreTraining": ("masked_patches",)},
    parts=(
        Part(
            ("image", "joint"),
            VIT_SIZES._replace(alone={**VIT_SIZES.alone, "picture.positions": "sinusoidal"}),
            _mae,
        ),
    ),
    heads=_mae_heads,
    prefix="vit.",
    spellings=SPELLINGS,
    older=(("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),),
    settings=_mae_settings,
    processor=PROCESSOR,
    agreeing=("decoder_num_hidden_layers", "decoder_num_attention_heads"),
)
