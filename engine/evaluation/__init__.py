"""Evaluation on held-out pairs: retrieval, matching, masked words, zero-shot classification."""

from engine.evaluation.evaluate import describe, evaluate

__all__ = ["describe", "evaluate"]
