"""LayerNorm with what stands around it fused in."""

from vlkernels.ops.layer_norm.functional import layer_norm
from vlkernels.ops.layer_norm.module import FusedLayerNorm

__all__ = ["FusedLayerNorm", "layer_norm"]
