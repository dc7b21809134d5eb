"""T5's stacks."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.pieces import Piece, linear


def stack(ours: str, theirs: str, layers: int, *, decoder: bool, gated: bool) -> Iterator[Piece]:
    """A `PackedTransformer` of `T5Stack`'s tensors."""
    first = f"{theirs}.block.0.layer.0.SelfAttention"
    yield Piece(f"{ours}.distances.tables.0", (f"{first}.relative_attention_bias.weight",))
    for layer in range(layers):
        yield from _block(f"{ours}.blocks.{layer}", f"{theirs}.block.{layer}.layer", decoder, gated)
    yield from linear(f"{ours}.final_norm", f"{theirs}.final_layer_norm", biased=False)


def _block(ours: str, theirs: str, decoder: bool, gated: bool) -> Iterator[Piece]:
    own, cross, last = f"{theirs}.0.SelfAttention", f"{theirs}.1.EncDecAttention", 2 if decoder else 1
    inner = ("wi_0", "wi_1") if gated else ("wi",)
    maps = {
        "self_attention.norm": [f"{theirs}.0.layer_norm"],
        "self_attention.query_key_value": [f"{own}.{part}" for part in "qkv"],
        "self_attention.output": [f"{own}.o"],
        "feed_forward.norm": [f"{theirs}.{last}.layer_norm"],
        "feed_forward.inner": [f"{theirs}.{last}.DenseReluDense.{part}" for part in inner],
        "feed_forward.output": [f"{theirs}.{last}.DenseReluDense.wo"],
    }
    if decoder:
        maps |= {
            "cross_attention.norm": [f"{theirs}.1.layer_norm"],
            "cross_attention.query": [f"{cross}.q"],
            "cross_attention.key_value": [f"{cross}.{part}" for part in "kv"],
            "cross_attention.output": [f"{cross}.o"],
        }
    for name, sources in maps.items():
        yield from linear(f"{ours}.{name}", *sources, biased=False)
