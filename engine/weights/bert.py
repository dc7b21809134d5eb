"""BERT's names, which RoBERTa, LayoutLM and others have too."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights.pieces import Piece, beneath, linear

PAGE = {"x": "x", "y": "y", "heights": "h", "widths": "w"}


def text_tower(layers: int, *, page: bool = False, pooler: bool = True) -> Iterator[Piece]:
    """A text role of `BertModel`'s tensors, or of `LayoutLMModel`'s with the tables of a page."""
    yield from embedder("embedder", page=page)
    yield from stack("transformer", layers)
    if pooler:
        yield from linear("pooling.dense", "pooler.dense")


def embedder(ours: str, *, page: bool = False) -> Iterator[Piece]:
    """A `TextEmbedder`."""
    for name, table in (("words", "word"), ("positions", "position"), ("types", "token_type")):
        yield Piece(f"{ours}.{name}", (f"embeddings.{table}_embeddings.weight",))
    for name, axis in PAGE.items() if page else ():
        yield Piece(f"{ours}.page.{name}", (f"embeddings.{axis}_position_embeddings.weight",))
    yield from linear(f"{ours}.norm", "embeddings.LayerNorm")


def stack(ours: str, layers: int, *, first: int = 0, crosses: bool = False) -> Iterator[Piece]:
    """A `PackedTransformer` of the layers from `first` on."""
    for layer in range(layers):
        yield from _block(f"{ours}.blocks.{layer}", f"encoder.layer.{first + layer}", crosses)


def _block(ours: str, theirs: str, crosses: bool) -> Iterator[Piece]:
    attention = f"{theirs}.attention.self"
    maps = {
        "self_attention.query_key_value": [f"{attention}.{part}" for part in ("query", "key", "value")],
        "self_attention.output": [f"{theirs}.attention.output.dense"],
        "self_attention.norm": [f"{theirs}.attention.output.LayerNorm"],
        "feed_forward.inner": [f"{theirs}.intermediate.dense"],
        "feed_forward.output": [f"{theirs}.output.dense"],
        "feed_forward.norm": [f"{theirs}.output.LayerNorm"],
    }
    if crosses:
        cross = f"{theirs}.crossattention"
        maps |= {
            "cross_attention.query": [f"{cross}.self.query"],
            "cross_attention.key_value": [f"{cross}.self.key", f"{cross}.self.value"],
            "cross_attention.output": [f"{cross}.output.dense"],
            "cross_attention.norm": [f"{cross}.output.LayerNorm"],
        }
    for name, sources in maps.items():
        yield from linear(f"{ours}.{name}", *sources)


def pretraining(layers: int) -> Iterator[Piece]:
    """`BertForPreTraining`."""
    yield from beneath("text", "bert", text_tower(layers))
    yield from masked_language("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias")
    yield from linear("heads.next_sentence.classifier", "cls.seq_relationship")


def roberta_masked_language(layers: int) -> Iterator[Piece]:
    """`RobertaForMaskedLM`."""
    yield from beneath("text", "roberta", text_tower(layers, pooler=False))
    yield from masked_language("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")


def masked_language(dense: str, norm: str, bias: str, ours: str = "heads.masked_language") -> Iterator[Piece]:
    """A head of masked words, by their names of its modules."""
    yield from linear(f"{ours}.transform", dense)
    yield from linear(f"{ours}.norm", norm)
    yield Piece(f"{ours}.bias", (bias,))
