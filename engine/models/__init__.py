"""Embedders, the packed transformer, heads, and the models made of them."""

from engine.config import Config
from engine.models.align_and_fuse import AlignAndFuse
from engine.models.base import VisionLanguageModel
from engine.models.one_stream import OneStream

__all__ = ["AlignAndFuse", "OneStream", "VisionLanguageModel", "build_model"]


def build_model(config: Config, vocab_size: int) -> VisionLanguageModel:
    """The model a run describes, freshly initialised from torch's generator."""
    options, regions = config.model, config.data.regions
    if options.joint is None:
        model: VisionLanguageModel = AlignAndFuse(options, vocab_size, config.impl)
    else:
        model = OneStream(
            options.joint,
            vocab_size,
            feature_values=regions.feature_values,
            classes=regions.classes,
            initializer_range=options.initializer_range,
            impl=config.impl,
        )
    model.checkpoint_activations(config.train.activation_checkpointing)
    return model
