"""GPT-2, whose maps are stored as [in, out]; GPT's blocks have the same names."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.pieces import Piece, linear


def stack(layers: int) -> Iterator[Piece]:
    """A pre-norm `PackedTransformer` of `GPT2Model`'s tensors."""
    for layer in range(layers):
        ours, theirs = f"blocks.{layer}", f"h.{layer}"
        yield from linear(f"{ours}.self_attention.norm", f"{theirs}.ln_1")
        yield from linear(f"{ours}.self_attention.query_key_value", f"{theirs}.attn.c_attn", transposed=True)
        yield from linear(f"{ours}.self_attention.output", f"{theirs}.attn.c_proj", transposed=True)
        yield from linear(f"{ours}.feed_forward.norm", f"{theirs}.ln_2")
        yield from linear(f"{ours}.feed_forward.inner", f"{theirs}.mlp.c_fc", transposed=True)
        yield from linear(f"{ours}.feed_forward.output", f"{theirs}.mlp.c_proj", transposed=True)
    yield from linear("final_norm", "ln_f")
