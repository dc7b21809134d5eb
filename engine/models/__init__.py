"""Embedders, the packed transformer, heads, and the model made of them."""

from engine.models.model import VisionLanguageModel

__all__ = ["VisionLanguageModel"]
