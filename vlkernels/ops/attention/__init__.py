"""Attention over packed samples with a table of visible segments."""

from vlkernels.ops.attention.bias import RelativeBias
from vlkernels.ops.attention.functional import attention, attention_qkvpacked

__all__ = ["RelativeBias", "attention", "attention_qkvpacked"]
