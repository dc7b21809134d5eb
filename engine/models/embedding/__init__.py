"""Embedders: ids, pictures and regions become rows of a packed stream."""

from engine.models.embedding.dictionary import cells_of_one_code
from engine.models.embedding.image import Cells, GridEmbedder, ImageEmbedder, make_image_embedder
from engine.models.embedding.learned import LearnedEmbedder
from engine.models.embedding.rows import RowMaker, Rows
from engine.models.embedding.text import TextEmbedder

__all__ = [
    "Cells",
    "GridEmbedder",
    "ImageEmbedder",
    "LearnedEmbedder",
    "RowMaker",
    "Rows",
    "TextEmbedder",
    "cells_of_one_code",
    "make_image_embedder",
]
