"""The transport distance as Triton kernels: a program holds a sample, or streams it through the second cache where it is long."""
