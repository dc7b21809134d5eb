from vlkernels.ops.triplet_loss.functional import triplet_loss

__all__ = ["triplet_loss"]
