"""Blocks of BERT and of what kept its names: RoBERTa, ELECTRA, SpanBERT, LayoutLM, BLIP's text model, ViLBERT's text."""

from __future__ import annotations

from collections.abc import Container, Iterator

from engine.weights.pieces import Piece, linear


def stack(layers: int, *, crossing: Container[int] = ()) -> Iterator[Piece]:
    """A post-norm `PackedTransformer` of `BertEncoder`'s tensors; layers that are `crossing` have cross-attention."""
    for layer in range(layers):
        ours, theirs = f"blocks.{layer}", f"layer.{layer}"
        yield from self_attention(f"{ours}.self_attention", f"{theirs}.attention", "self")
        if layer in crossing:
            yield from cross_attention(f"{ours}.cross_attention", f"{theirs}.crossattention", "self")
        yield from feed_forward(f"{ours}.feed_forward", f"{theirs}.intermediate", f"{theirs}.output")


def self_attention(ours: str, theirs: str, maps: str) -> Iterator[Piece]:
    """`maps` is what they call the module of the three projections."""
    yield from linear(f"{ours}.query_key_value", *(f"{theirs}.{maps}.{part}" for part in ("query", "key", "value")))
    yield from linear(f"{ours}.output", f"{theirs}.output.dense")
    yield from linear(f"{ours}.norm", f"{theirs}.output.LayerNorm")


def cross_attention(ours: str, theirs: str, maps: str) -> Iterator[Piece]:
    yield from linear(f"{ours}.query", f"{theirs}.{maps}.query")
    yield from linear(f"{ours}.key_value", f"{theirs}.{maps}.key", f"{theirs}.{maps}.value")
    yield from linear(f"{ours}.output", f"{theirs}.output.dense")
    yield from linear(f"{ours}.norm", f"{theirs}.output.LayerNorm")


def feed_forward(ours: str, inner: str, output: str) -> Iterator[Piece]:
    yield from linear(f"{ours}.inner", f"{inner}.dense")
    yield from linear(f"{ours}.output", f"{output}.dense")
    yield from linear(f"{ours}.norm", f"{output}.LayerNorm")
