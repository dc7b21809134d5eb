"""Whole training steps of published architectures: data, our packed model, padded peers; see benchmarks/train_step.py."""
