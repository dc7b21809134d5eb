"""The fused ops; one folder each. A new op is its folder, its line in each list here and one test file."""

from __future__ import annotations

import importlib

from vlkernels.core.spec import OpSpec
from vlkernels.ops.attention import RelativeBias, attention, attention_qkvpacked
from vlkernels.ops.contrastive_loss import contrastive_loss
from vlkernels.ops.embed_layer_norm import embed_layer_norm
from vlkernels.ops.hard_negatives import hard_negatives
from vlkernels.ops.late_interaction_loss import late_interaction_loss
from vlkernels.ops.layer_norm import FusedLayerNorm, FusedRMSNorm, layer_norm, rms_norm
from vlkernels.ops.linear import linear
from vlkernels.ops.linear_cross_entropy import linear_cross_entropy
from vlkernels.ops.optimal_transport import optimal_transport
from vlkernels.ops.packing import pack, put_segments, segment_mean, take_rows, take_segments, unpack
from vlkernels.ops.patchify import patchify
from vlkernels.ops.sigmoid_loss import sigmoid_loss
from vlkernels.ops.triplet_loss import triplet_loss

FOLDERS: tuple[str, ...] = (
    "attention",
    "contrastive_loss",
    "embed_layer_norm",
    "hard_negatives",
    "late_interaction_loss",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "optimal_transport",
    "packing",
    "patchify",
    "sigmoid_loss",
    "triplet_loss",
)

__all__: list[str] = [
    "FusedLayerNorm",
    "FusedRMSNorm",
    "RelativeBias",
    "attention",
    "attention_qkvpacked",
    "contrastive_loss",
    "embed_layer_norm",
    "hard_negatives",
    "late_interaction_loss",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "optimal_transport",
    "pack",
    "patchify",
    "put_segments",
    "rms_norm",
    "segment_mean",
    "sigmoid_loss",
    "take_rows",
    "take_segments",
    "triplet_loss",
    "unpack",
]


def specs() -> tuple[OpSpec, ...]:
    """Every op's declaration, in the order of :data:`FOLDERS`."""
    return tuple(spec for folder in FOLDERS for spec in importlib.import_module(f"vlkernels.ops.{folder}.spec").SPECS)
