"""The model of a run, with the heads of its objectives."""

from __future__ import annotations

from engine.config import Config
from engine.models import AlignAndFuse, OneStream, VisionLanguageModel
from engine.objectives import add_heads


def build_model(config: Config, vocab_size: int) -> VisionLanguageModel:
    """The model a run describes, freshly initialised from torch's generator."""
    options = config.model
    if options.joint is None:
        model: VisionLanguageModel = AlignAndFuse(options, vocab_size, config.impl)
    else:
        ranges = {"initializer_range": options.initializer_range}
        model = OneStream(options.joint, vocab_size, config.data.regions, **ranges, impl=config.impl)
    add_heads(model, config.objectives.active)
    model.checkpoint_activations(config.train.activation_checkpointing)
    return model
