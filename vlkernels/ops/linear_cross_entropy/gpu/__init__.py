"""Triton kernels of the linear cross-entropy."""
