"""Patchify: images of any sizes, cut into patches, in packed order."""

from vlkernels.ops.patchify.functional import patchify

__all__ = ["patchify"]
