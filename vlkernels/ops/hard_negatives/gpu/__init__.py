"""The draw of hard negatives as Triton kernels: a weight for every block of keys, then a key of the drawn block."""
