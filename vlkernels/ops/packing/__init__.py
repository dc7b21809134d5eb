"""Packing: padded, packed and per-segment tensors, one pass each way."""

from vlkernels.ops.packing.functional import (
    pack,
    put_segments,
    segment_mean,
    take_rows,
    take_segments,
    unpack,
)

__all__ = ["pack", "put_segments", "segment_mean", "take_rows", "take_segments", "unpack"]
