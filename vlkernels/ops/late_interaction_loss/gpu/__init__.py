"""Late interaction in Triton: kernels, their launches and tiles, and the arithmetic of two blocks by them."""
