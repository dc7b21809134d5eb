"""Embedders, the packed transformer, heads, and the models made of them."""

from engine.models.align_and_fuse import AlignAndFuse
from engine.models.base import VisionLanguageModel
from engine.models.one_stream import OneStream

__all__ = ["AlignAndFuse", "OneStream", "VisionLanguageModel"]
