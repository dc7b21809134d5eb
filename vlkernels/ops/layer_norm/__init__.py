"""LayerNorm and RMSNorm with what stands around them fused in."""

from vlkernels.ops.layer_norm.functional import layer_norm, rms_norm
from vlkernels.ops.layer_norm.module import FusedLayerNorm, FusedRMSNorm

__all__ = ["FusedLayerNorm", "FusedRMSNorm", "layer_norm", "rms_norm"]
