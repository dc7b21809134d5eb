"""GPT-2, whose maps are stored as [in, out]; GPT's blocks have the same names."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.pieces import Piece, linear


def stack(ours: str, theirs: str, layers: int) -> Iterator[Piece]:
    """A pre-norm `PackedTransformer` of `GPT2Model`'s tensors."""
    for layer in range(layers):
        block, source = f"{ours}.blocks.{layer}", f"{theirs}.h.{layer}"
        yield from linear(f"{block}.self_attention.norm", f"{source}.ln_1")
        yield from linear(f"{block}.self_attention.query_key_value", f"{source}.attn.c_attn", transposed=True)
        yield from linear(f"{block}.self_attention.output", f"{source}.attn.c_proj", transposed=True)
        yield from linear(f"{block}.feed_forward.norm", f"{source}.ln_2")
        yield from linear(f"{block}.feed_forward.inner", f"{source}.mlp.c_fc", transposed=True)
        yield from linear(f"{block}.feed_forward.output", f"{source}.mlp.c_proj", transposed=True)
    yield from linear(f"{ours}.final_norm", f"{theirs}.ln_f")
