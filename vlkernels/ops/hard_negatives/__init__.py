from vlkernels.ops.hard_negatives.functional import hard_negatives

__all__ = ["hard_negatives"]
