"""What roles have in common: modules and tables of the role that reads a text stand in the place of their own."""

from __future__ import annotations

from torch import nn

from engine.models.roles import Decoder
from engine.models.transformer import PackedTransformer
from engine.sections import Model


def share(model: nn.Module, options: Model) -> None:
    """Tie what the sections say is shared."""
    if options.fusion is not None and options.fusion.begins_with == "ids":
        _tie_blocks(model.fusion.transformer, model.text.transformer, ("self_attention", "feed_forward"))
    if options.generator is not None and options.generator.shares == "embedder":
        model.generator.embedder = model.text.embedder
    if options.decoder is not None:
        _share_decoder(model.decoder, model, options.decoder.shares)


def _share_decoder(decoder: Decoder, model: nn.Module, shares: str) -> None:
    if shares == "words":
        decoder.embedder.words = model.joint.text.words if model.text is None else model.text.embedder.words
    if shares == "all_but_attention":
        decoder.embedder = model.text.embedder
        _tie_blocks(decoder.transformer, model.text.transformer, ("feed_forward",))
        if model.fusion is not None:
            _tie_blocks(decoder.transformer, model.fusion.transformer, ("cross_attention",))


def _tie_blocks(own: PackedTransformer, other: PackedTransformer, parts: tuple[str, ...]) -> None:
    for block, source in zip(own.blocks, other.blocks, strict=True):
        for part in parts:
            setattr(block, part, getattr(source, part))
