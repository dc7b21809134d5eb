"""The names that `transformers` gives the weights of each family of models, by ours: one file per family."""

from engine.weights.pieces import Piece

__all__ = ["Piece"]
