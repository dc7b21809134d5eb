"""The triplet loss in Triton: kernels, their launches and those that are compiled ahead of time."""
