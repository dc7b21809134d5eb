"""Attention by other libraries' variable-length kernels."""
