"""Whole training steps of published architectures: their data, our packed model and its padded peers; see benchmarks/train_step.py."""
