"""GPT-2 and GPT, whose maps are stored as [in, out]."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.pieces import Piece, linear


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
