"""ELECTRA: BERT's blocks behind narrow tables, as a discriminator and as its generator."""

from __future__ import annotations

from collections.abc import Iterator

from engine.weights import bert
from engine.weights.pieces import Piece, beneath, linear

HEAD = "heads.replaced_tokens"


def discriminator(layers: int) -> Iterator[Piece]:
    """`ElectraForPreTraining`."""
    yield from _tower("text", layers)
    yield from linear(f"{HEAD}.transform", "discriminator_predictions.dense")
    yield from linear(f"{HEAD}.replaced", "discriminator_predictions.dense_prediction")


def generator(layers: int) -> Iterator[Piece]:
    """`ElectraForMaskedLM`."""
    yield from _tower("generator", layers)
    names = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")
    yield from bert.masked_language(*names, ours=f"{HEAD}.words")


def _tower(ours: str, layers: int) -> Iterator[Piece]:
    yield from beneath(ours, "electra", bert.embedder("embedder"))
    yield from linear(f"{ours}.widening", "electra.embeddings_project")
    yield from beneath(ours, "electra", bert.stack("transformer", layers))
