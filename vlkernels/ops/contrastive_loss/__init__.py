from vlkernels.ops.contrastive_loss.functional import contrastive_loss

__all__ = ["contrastive_loss"]
