"""Evaluation on held-out samples: what every objective of the run measures, zero-shot classification, a sheet."""

from engine.evaluation.evaluate import describe, evaluate

__all__ = ["describe", "evaluate"]
