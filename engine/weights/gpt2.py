"""GPT-2 and GPT, whose maps are stored as [in, out]."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.bert import PLAIN
from engine.weights.family import Family, Part, Place
from engine.weights.pieces import Piece, linear
from engine.weights.sizes import Sizes

TABLES = {True: ("wte", "wpe"), False: ("tokens_embed", "positions_embed")}
"""Of words and of positions, by whether norms are before the sub-layers (GPT-2) or behind them (GPT)."""


def embedder(ours: str, theirs: str, *, pre_norm: bool = True) -> Iterator[Piece]:
    """A `TextEmbedder` of the tables of `GPT2Model`, or of `OpenAIGPTModel`."""
    for name, table in zip(("words", "positions"), TABLES[pre_norm], strict=True):
        yield Piece(f"{ours}.{name}", (f"{theirs}.{table}.weight",))


def stack(ours: str, theirs: str, layers: int, *, pre_norm: bool = True) -> Iterator[Piece]:
    """A `PackedTransformer` of `GPT2Model`'s tensors, or of `OpenAIGPTModel`'s."""
    for layer in range(layers):
        block, source = f"{ours}.blocks.{layer}", f"{theirs}.h.{layer}"
        yield from linear(f"{block}.self_attention.norm", f"{source}.ln_1")
        yield from linear(f"{block}.self_attention.query_key_value", f"{source}.attn.c_attn", transposed=True)
        yield from linear(f"{block}.self_attention.output", f"{source}.attn.c_proj", transposed=True)
        yield from linear(f"{block}.feed_forward.norm", f"{source}.ln_2")
        yield from linear(f"{block}.feed_forward.inner", f"{source}.mlp.c_fc", transposed=True)
        yield from linear(f"{block}.feed_forward.output", f"{source}.mlp.c_proj", transposed=True)
    if pre_norm:
        yield from linear(f"{ours}.final_norm", f"{theirs}.ln_f")


STACK = {"width": "n_embd", "layers": "n_layer", "heads": "n_head", "eps": "layer_norm_epsilon"}
ALWAYS = PLAIN | {
    "positions": "learned", "position_offset": 0, "types": 0, "embedding_norm": False, "embedding_width": None, "page": None,
    "mask": "causal",
}  # fmt: skip
ALONE = {"source": None}
WRITTEN = {"max_positions": "n_positions", "dropout": "resid_pdrop", "attention_dropout": "attn_pdrop"}
GPT2_SIZES = Sizes(
    same=STACK | {"mlp_width": "n_inner", "activation": "activation_function"},
    always=ALWAYS | {"norm": "pre", "final_norm": True},
    alone=ALONE,
    written=WRITTEN,
    constants={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    defaults={
        "n_inner": lambda settings: 4 * settings["n_embd"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
)
GPT_SIZES = Sizes(
    same=STACK,
    always=ALWAYS | {"norm": "post", "activation": "gelu_tanh", "mlp_per_width": 4},
    alone=ALONE,
    written=WRITTEN,
    constants={"afn": "gelu"},
    defaults={"afn": "gelu", "layer_norm_epsilon": 1e-5},
)


def _decoder(place: Place, pre_norm: bool) -> Iterator[Piece]:
    yield from embedder(place.words, "transformer", pre_norm=pre_norm)
    yield from stack(place.transformer, "transformer", place.layers, pre_norm=pre_norm)


GPT2 = Family(
    name="gpt2",
    kind="gpt2",
    classes={"GPT2LMHeadModel": ()},
    parts=(Part(("text", "decoder"), GPT2_SIZES, lambda place: _decoder(place, True)),),
    prefix="transformer.",
    borders="none",
)
GPT = Family(
    name="gpt",
    kind="openai-gpt",
    classes={"OpenAIGPTLMHeadModel": ()},
    parts=(Part(("text", "decoder"), GPT_SIZES, lambda place: _decoder(place, False)),),
    prefix="transformer.",
    borders="none",
)
