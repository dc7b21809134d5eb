"""Attention in Triton: kernels, their launches, tiles and work lists."""
