"""The proof that ships with the kernels: the error rule, the contract of every op, and the sync lint."""
