"""ELECTRA: BERT's blocks behind narrow tables, as a discriminator and as its generator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.weights import bert
from engine.weights.family import Family, Part
from engine.weights.pieces import Piece, beneath, linear

HEAD = "heads.replaced_tokens"
WORDS = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")


def discriminator(layers: int) -> Iterator[Piece]:
    """`ElectraForPreTraining`."""
    yield from _tower("text", layers)
    yield from _detection(_=None)


def generator(layers: int) -> Iterator[Piece]:
    """`ElectraForMaskedLM`."""
    yield from _tower("generator", layers)
    yield from bert.masked_language(*WORDS, ours=f"{HEAD}.words")


def _tower(ours: str, layers: int) -> Iterator[Piece]:
    yield from beneath(ours, "electra", bert.embedder("embedder"))
    yield from linear(f"{ours}.widening", "electra.embeddings_project")
    yield from beneath(ours, "electra", bert.stack("transformer", layers))


def _detection(_: Any) -> Iterator[Piece]:
    yield from linear(f"{HEAD}.transform", "discriminator_predictions.dense")
    yield from linear(f"{HEAD}.replaced", "discriminator_predictions.dense_prediction")


SIZES = bert.SIZES._replace(
    same=bert.STACK | {"table_width": "embedding_size"},
    always={name: value for name, value in bert.SIZES.always.items() if name != "embedding_width"},
)
ELECTRA = Family(
    name="electra",
    kind="electra",
    classes={"ElectraForPreTraining": ("replaced_tokens",), "ElectraModel": ()},
    parts=(Part(("text",), SIZES, lambda place: _tower(place.role, place.layers)),),
    heads=_detection,
    prefix="electra.",
)
GENERATOR = Family(
    name="electra_generator",
    kind="electra",
    classes={"ElectraForMaskedLM": ("replaced_tokens",)},
    parts=(Part(("generator",), SIZES, lambda place: _tower(place.role, place.layers)),),
    heads=lambda model: bert.masked_language(*WORDS, ours=f"{HEAD}.words"),
    prefix="electra.",
)
