from vlkernels.ops.linear_cross_entropy.functional import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
