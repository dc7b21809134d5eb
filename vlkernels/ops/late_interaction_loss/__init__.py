from vlkernels.ops.late_interaction_loss.functional import late_interaction_loss

__all__ = ["late_interaction_loss"]
