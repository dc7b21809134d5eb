"""LayerNorm of a sum of embeddings."""

from vlkernels.ops.embed_layer_norm.functional import embed_layer_norm

__all__ = ["embed_layer_norm"]
