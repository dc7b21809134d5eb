"""The model of a run, with the heads of its objectives."""

from __future__ import annotations

from engine.config import Config
from engine.models import VisionLanguageModel
from engine.objectives import add_heads


def build_model(config: Config, vocab_size: int) -> VisionLanguageModel:
    """The model a run describes, freshly initialised from torch's generator."""
    model = VisionLanguageModel(config.model, vocab_size, config.data.regions, config.impl)
    add_heads(model, config.objectives.active)
    model.add_teacher({part for objective in config.objectives.active.values() for part in objective.taught_by})
    model.checkpoint_activations(config.train.activation_checkpointing)
    return model
