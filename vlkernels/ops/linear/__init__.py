"""A linear map: rows times a matrix, and a bias."""

from vlkernels.ops.linear.functional import linear

__all__ = ["linear"]
