"""Embedders: ids, pictures and regions become rows of a packed stream."""

from engine.models.embedding.image import ImageEmbedder, make_image_embedder
from engine.models.embedding.learned import LearnedEmbedder
from engine.models.embedding.rows import RowMaker, Rows
from engine.models.embedding.text import TextEmbedder

__all__ = ["ImageEmbedder", "LearnedEmbedder", "RowMaker", "Rows", "TextEmbedder", "make_image_embedder"]
