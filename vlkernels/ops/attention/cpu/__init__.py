"""Attention on a CPU: the compiled kernels for short samples, and grouped calls of PyTorch's."""
