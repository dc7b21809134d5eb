from vlkernels.ops.sigmoid_loss.functional import sigmoid_loss

__all__ = ["sigmoid_loss"]
