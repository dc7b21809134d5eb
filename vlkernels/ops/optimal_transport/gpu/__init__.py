"""The transport distance as Triton kernels: a program is a sample."""
