"""OPT: a decoder of BART's names with norms before the sub-layers; BLIP-2's second stage writes with one."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights import bart
from engine.weights.bert import PLAIN
from engine.weights.family import Family, Part, Place
from engine.weights.pieces import Piece, linear
from engine.weights.sizes import Sizes

SIZES = Sizes(
    same={
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp_width": "ffn_dim",
        "activation": "activation_function",
        "table_width": "word_embed_proj_dim",
    },
    always=PLAIN
    | {
        "norm": "pre",
        "final_norm": True,
        "eps": 1e-5,
        "positions": "learned",
        "position_offset": 2,
        "types": 0,
        "embedding_norm": False,
        "page": None,
        "mask": "causal",
    },
    alone={"source": None},
    written={"max_positions": "max_position_embeddings", "dropout": "dropout", "attention_dropout": "attention_dropout"},
    constants={"do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True},
    defaults={
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "activation_function": "relu",
        "word_embed_proj_dim": lambda settings: settings["hidden_size"],
    },
)


def decoder(place: Place, theirs: str) -> Iterator[Piece]:
    """A causal role of `OPTModel`'s tensors."""
    yield Piece(f"{place.words}.words", (f"{theirs}.embed_tokens.weight",))
    yield Piece(f"{place.words}.positions", (f"{theirs}.embed_positions.weight",))
    yield from bart.stack(place.transformer, theirs, place.layers, decoder=False)
    yield from linear(f"{place.transformer}.final_norm", f"{theirs}.final_layer_norm")


OPT = Family(
    name="opt",
    kind="opt",
    classes={"OPTForCausalLM": ()},
    parts=(Part(("decoder", "text"), SIZES, lambda place: decoder(place, "model.decoder")),),
    prefix="model.",
    borders="none",
)
