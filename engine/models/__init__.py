"""Embedders, the packed transformer, heads, and the models made of them."""

from engine.config import Config
from engine.models.model import VisionLanguageModel

__all__ = ["VisionLanguageModel", "build_model"]


def build_model(config: Config, vocab_size: int) -> VisionLanguageModel:
    """The model a run describes, freshly initialised from torch's generator."""
    model = VisionLanguageModel(config.model, vocab_size, config.impl)
    model.checkpoint_activations(config.train.activation_checkpointing)
    return model
