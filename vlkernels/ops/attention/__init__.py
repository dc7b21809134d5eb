"""Attention over packed samples with a table of visible segments."""

from vlkernels.ops.attention.functional import attention, attention_qkvpacked

__all__ = ["attention", "attention_qkvpacked"]
