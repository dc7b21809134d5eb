"""BERT's names, which RoBERTa, LayoutLM and others have too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.weights.family import WORD_HEADS, Family, Part, Place
from engine.weights.pieces import Piece, beneath, linear
from engine.weights.sizes import Sizes

PAGE = {"x": "x", "y": "y", "heights": "h", "widths": "w"}

STACK = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "eps": "layer_norm_eps",
    "activation": "hidden_act",
}
"""Their name of what must agree, by ours."""
PLAIN = {
    "norm_kind": "layer",
    "biases": "all",
    "gated": False,
    "shared": False,
    "softmax_scale": None,
    "relative_position": None,
    "relative_box": None,
}
"""Options of a stack that most have as they are."""
POST = PLAIN | {"norm": "post", "positions": "learned", "embedding_norm": True, "embedding_width": None}
ALONE = {
    "queries": 0,
    "image": None,
    "kinds": False,
    "source": None,
    "text": True,
    "mask": "full",
    "page": None,
    "has_types": True,
}
"""What a text encoder has nothing for."""
ROWS = {
    "types": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
PAD_ID = 0
ABSOLUTE = {"position_embedding_type": "absolute"}
SIZES = Sizes(
    same=STACK,
    always=POST | {"position_offset": 0},
    alone=ALONE,
    written=ROWS | {"max_positions": "max_position_embeddings"},
    constants=ABSOLUTE,
    defaults=ABSOLUTE | {"layer_norm_eps": 1e-12, "hidden_act": "gelu"},
)
ROLES = ("text", "joint", "fusion", "decoder", "generator")
BERT_HEAD = tuple(f"cls.predictions.{name}" for name in ("transform.dense", "transform.LayerNorm", "bias"))


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


def encoder(place: Place, theirs: str, *, page: bool = False) -> Iterator[Piece]:
    """A role of the tensors of a `BertModel`. Queries begin with the networks that are the text's, as BLIP-2's do."""
    if place.role != "fusion":
        yield from beneath("", theirs, embedder(place.words, page=page))
    for piece in beneath("", theirs, stack(place.transformer, place.layers, first=place.first)):
        yield piece
        if ".feed_forward." in piece.ours:
            for number in range(2):
                yield piece._replace(ours=piece.ours.replace(".feed_forward.", f".feed_forwards.{number}."))
    yield from beneath("", theirs, linear(f"{place.pooling}.dense", "pooler.dense"))


def word_heads(dense: str, norm: str, bias: str) -> Iterator[Piece]:
    """Whichever a run has, by their names of its modules."""
    for head in WORD_HEADS:
        yield from masked_language(dense, norm, bias, head)


def _bert_heads(model: Any) -> Iterator[Piece]:
    yield from word_heads(*BERT_HEAD)
    yield from linear("heads.next_sentence.classifier", "cls.seq_relationship")


BERT = Family(
    name="bert",
    kind="bert",
    classes={
        "BertForPreTraining": ("masked_language", "next_sentence"),
        "BertForMaskedLM": ("masked_language",),
        "BertModel": (),
    },
    parts=(Part(ROLES, SIZES, lambda place: encoder(place, "bert")),),
    heads=_bert_heads,
    prefix="bert.",
    older=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
)
ROBERTA = Family(
    name="roberta",
    kind="roberta",
    classes={"RobertaForMaskedLM": ("masked_language",), "RobertaModel": ()},
    parts=(
        Part(
            ROLES,
            SIZES._replace(
                always=POST | {"position_offset": 2},
                written=ROWS | {"position_rows": "max_position_embeddings"},
                constants=ABSOLUTE | {"pad_token_id": 1},  # of which follows where positions begin
                defaults=SIZES.defaults | {"pad_token_id": 1},
            ),
            lambda place: encoder(place, "roberta"),
        ),
    ),
    heads=lambda model: word_heads("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    prefix="roberta.",
    swapped=lambda tokenizer: (PAD_ID, tokenizer.cls_id),  # what has pad_token_id counts for no position
)
LAYOUTLM = Family(
    name="layoutlm",
    kind="layoutlm",
    classes={"LayoutLMForMaskedLM": ("masked_language",), "LayoutLMModel": ()},
    parts=(
        Part(
            ROLES,
            SIZES._replace(always=SIZES.always | {"page": "sum"}, alone={**ALONE, "page": "sum"}),
            lambda place: encoder(place, "layoutlm", page=True),
        ),
    ),
    heads=lambda model: word_heads(*BERT_HEAD),
    prefix="layoutlm.",
    settings=lambda model: {"max_2d_position_embeddings": 1024},
)
