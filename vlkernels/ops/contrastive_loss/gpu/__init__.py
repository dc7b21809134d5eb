"""Triton kernels of the contrastive loss."""
